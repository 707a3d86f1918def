"""Submitting requests and waiting for their answers."""
