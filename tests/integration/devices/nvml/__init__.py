"""A stand-in for the driver's NVML library, and processes that use it."""
