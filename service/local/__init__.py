"""Gateway and engines on this machine."""
