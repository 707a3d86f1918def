"""Where requests go that cannot be answered here: the next engine, another worker, the dead letters."""
