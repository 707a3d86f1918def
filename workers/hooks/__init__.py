"""Where the fleet hooks into Celery and kombu."""
