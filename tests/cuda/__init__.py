"""The engine's real CUDA environment, looked at on a machine without a GPU: `make test-cuda`."""
