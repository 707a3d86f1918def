"""What both sides of the queue need: contract, settings, errors, names, registry."""
