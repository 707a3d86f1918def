"""Who is told of what happens to requests, batches, models, leases and GPUs. Never in their way."""
