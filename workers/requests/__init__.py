"""A claimed request: what it is, where it stands, and how large it is."""
