"""A small app with the structure of the service, for the plane's own tests."""
