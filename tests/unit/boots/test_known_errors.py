"""Known errors: the literal words of users and programs, and text that only resembles them."""

from __future__ import annotations

import pytest

from service.boots.known_errors import KNOWN, recognise

# What people who ran such services pasted, then what Modal, PyTorch, vLLM, the hub and this service print.
LINES = {
    "start-up time-out": (
        "Error: Container failed to start within 10 minutes",
        "Model 'qwen3-8b' on H100 did not start. It was not ready within 1800 s (SERVICE_STARTUP_TIMEOUT_S).",
        "startup timed out",
    ),
    "GPU memory": (
        "CUDA out of memory",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "ValueError: To serve at least one request, 5.25 GiB KV cache is needed, which is larger than the available",
    ),
    "cold start": (
        "First request takes 2-3 minutes",
        ": waking qwen3-8b on H100, 12 s",
        "Model 'tiny' on H100 has been waking for 12 s. A request is held for at most 10 s (SERVICE_HOLD_S).",
    ),
    "model download": (
        "Error downloading model from HuggingFace",
        "401 Client Error: Unauthorized for url: https://huggingface.co/api/models/meta-llama/x",
        "huggingface_hub.errors.GatedRepoError: 403 Client Error.",
        "### Model Download Fails",
    ),
    "compilation": (
        "Torch compilation failed",
        "torch._dynamo.exc.BackendCompilerFailed: backend='inductor' raised:",
        "CUDA error: no kernel image is available for execution on the device",
    ),
    "endpoint limit": ("### Endpoint Limit Exceeded", "your plan is limited to 8 web endpoints"),
    "401": (
        "### Authentication Failed (401)",
        '{"error": {"message": "A valid API key is needed", "code": "invalid_api_key"}}',
        "openai.AuthenticationError: Error code: 401 - {'error': {}}",
        '"POST /v1/chat/completions HTTP/1.1" 401 Unauthorized',
    ),
}


@pytest.mark.parametrize(("name", "line"), [(name, line) for name, lines in LINES.items() for line in lines])
def test_known_error_is_recognised_by_its_literal_words(name: str, line: str) -> None:
    """Every kind that users reported; each says what to do."""
    (found,) = recognise(["INFO ready", line])
    assert (found.error.name, found.number, found.count) == (name, 2, 1)
    assert found.error.next.endswith(".")


def test_known_errors_here_are_all_there_are() -> None:
    """One that is added needs its words tested too."""
    assert set(LINES) == {error.name for error in KNOWN}


def test_known_error_is_told_once_with_its_first_line() -> None:
    """However often it is in the text."""
    (found,) = recognise(["x", "CUDA out of memory, first", "CUDA out of memory, second"])
    assert (found.line, found.number, found.count) == ("CUDA out of memory, first", 2, 2)


@pytest.mark.parametrize(
    "line",
    [
        'INFO: 127.0.0.1:4012 - "POST /v1/chat/completions HTTP/1.1" 200 OK',
        "Loading weights took 4.01 seconds",
        "torch.compile took 12.1 s in total",
        "Free memory on device: 76.2/79.1 GiB",
        "Downloading weights: 401 of 900 MB",
        "Supported endpoints: /v1/models",
    ],
)
def test_line_of_a_log_without_an_error_is_none(line: str) -> None:
    """Only words that mean a fault count."""
    assert recognise([line]) == []
