"""The part of the service that runs inside vLLM's process: standard library and vLLM only."""
