"""Where the fleet hooks into Celery and kombu, and what it relies upon there (:mod:`workers.hooks.internals`)."""
