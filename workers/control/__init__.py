"""What runs on a schedule, beside the path of requests."""
