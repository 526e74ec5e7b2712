"""The public door: who may come in, which model is meant, and the bytes between client and engine."""
