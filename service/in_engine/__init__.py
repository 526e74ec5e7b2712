"""What is put on the path of the engine's own Python; the gateway reads the HTTP contract from it too."""
