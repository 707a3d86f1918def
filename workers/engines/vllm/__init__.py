"""vLLM: requests join its running batch."""
