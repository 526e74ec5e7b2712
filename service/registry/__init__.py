"""What can be served and on what: models, GPUs, tiers."""
