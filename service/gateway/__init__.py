"""The public HTTP service in front of all engines: authentication, model routing, and forwarding of requests."""
