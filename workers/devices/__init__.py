"""GPUs: found with NVML, leased in Redis before CUDA is touched, and watched while they are held."""
