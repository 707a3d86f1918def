"""A request's way through an engine: admission, batching, running, ending."""
