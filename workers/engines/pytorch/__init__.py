"""PyTorch, by way of transformers."""
