"""What a worker process does beside its requests: it announces itself, and stops in order."""
