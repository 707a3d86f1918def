"""The workers: the Celery app, the batching consumer and the engines."""
