"""The models of an engine: loaded on demand, held to the reference, rested when they fail."""
