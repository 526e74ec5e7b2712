"""A small app of the shape of the service: what the plane is tested with."""
