"""Batches: files of requests, the worker that sends them to a pool, and their answers."""
