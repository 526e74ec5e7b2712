"""Measures a service from outside as clients see it: vLLM's own benchmark, Locust's users, and one report of both."""
