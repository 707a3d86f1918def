"""What is missing on this machine or wrong in the fleet, and what mends it."""
