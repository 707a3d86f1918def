"""GPUs, as far as they can be tested without one."""
