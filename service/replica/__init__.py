"""One engine and its lifecycle: prepare, start, stop."""
