"""Weights on disk: what is complete, what is fetched from the hub, at which commit."""
