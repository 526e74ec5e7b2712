"""Tests with the real engine (vLLM's CPU build, the built-in tiny model) and real clients."""
