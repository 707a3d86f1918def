"""DeepSpeed: models are held by processes of their own."""
