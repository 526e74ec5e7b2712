"""A model whose weights exceed the memory of the GPU in its name: refused with a lasting 4xx, and nothing wakes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import modal
import pytest

from service.gateway.app import create_app
from service.gateway.clients import load_clients
from service.gateway.metrics import Metrics
from service.gateway.router import ModelRouter
from service.gateway.tiers import Tiers
from service.keys import digests
from service.registry.models import Registry
from service.settings import Settings
from tests.engine.routes import error_of

KEYS = {"API_KEYS": "alice=sk-alice,bob=sk-bob", "API_LIMITS": '{"bob": {"models": ["qwen3-8b"]}}'}
CHAT = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def _modal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where Modal is asked for a pool, which is the first step of each wake."""

    class Cls:
        @staticmethod
        def from_name(app: str, _name: str) -> None:
            raise AssertionError(f"app {app} is asked for")

    monkeypatch.setattr(modal, "Cls", Cls)


def ask(model: str, path: str = CHAT, key: str = "sk-alice", models_file: Path | None = None, **body: Any) -> Any:
    """Send a request to the gateway of the deployed tiers; return status, headers and body of its answer."""
    settings = Settings(model="qwen3-8b")
    registry = Registry.load(models_file)
    clients = load_clients(KEYS, digests(KEYS), registry, settings.model)
    app = create_app(ModelRouter(registry, settings.model, Tiers(settings, {}).pool), clients, Metrics(), hold_s=5)
    headers = [(b"authorization", f"Bearer {key}".encode()), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
    sent: list[Any] = []
    incoming = [{"type": "http.request", "body": json.dumps({"model": model, **body}).encode()}]

    async def receive() -> Any:
        return incoming.pop() if incoming else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    start, *rest = sent
    return start["status"], dict(start["headers"]), json.loads(b"".join(part["body"] for part in rest))


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("stream", [False, True])
def test_request_for_a_tier_too_small_for_the_weights_is_400_and_wakes_nothing(path: str, stream: bool) -> None:
    """The error names tiers that fit; no client repeats a request after 400."""
    status, _, answer = ask("gemma-3-27b-l40s", path, messages=[], stream=stream)

    assert status == 400
    error = error_of(json.dumps(answer).encode(), path)
    assert error["type"] == "invalid_request_error"
    assert path == "/v1/messages" or (error["code"], error["param"]) == ("model_too_large", "model")
    assert error["message"] == (
        "Model 'gemma-3-27b' does not fit on L40S: its weights are 54.9 GB, and vLLM uses 44.2 of 48 GB (92%). "
        "Use 'gemma-3-27b-a100' (A100-80GB, $2.50/h, the cheapest that fits) or 'gemma-3-27b-h100' (H100, $3.95/h, "
        "its registry entry's own)."
    )


def test_request_for_a_gpu_without_kernels_for_the_model_is_400_and_wakes_nothing() -> None:
    """A T4 has the memory for gpt-oss; vLLM refuses it there."""
    status, _, answer = ask("gpt-oss-20b-t4")

    assert (status, answer["error"]["code"]) == (400, "gpu_not_supported")
    assert "from compute capability 8.0 on, and T4 has 7.5. Use 'gpt-oss-20b-l4' (L4" in answer["error"]["message"]


def test_request_for_an_adapter_on_a_tier_too_small_is_answered_with_the_adapters_name(tmp_path: Path) -> None:
    """The names in the error can be sent as they are, and mean the adapter."""
    file = tmp_path / "models.toml"
    file.write_text(
        '[models.mine]\nhub_id = "me/mine"\nweights_gb = 60\n'
        '[[models.mine.adapters]]\nname = "Poet"\nhub_id = "me/poet"\n'
    )
    status, _, answer = ask("poet-l4", models_file=file)

    assert status == 400
    assert "Use 'Poet-a100' " in answer["error"]["message"]
    choice = Registry.load(file).resolve("Poet-a100")
    assert (choice.spec.key, choice.gpu and choice.gpu.name) == ("mine", "A100-80GB")


def test_request_for_a_model_that_the_key_may_not_use_is_403_first() -> None:
    """The error reveals nothing about the model."""
    status, _, answer = ask("gemma-3-27b-l40s", key="sk-bob")

    assert (status, answer["error"]["code"]) == (403, "model_not_allowed")


def test_request_for_an_a100_goes_to_the_tier_of_the_80_gb_card() -> None:
    """Its short name and its full one mean one pool of one app."""
    router = ModelRouter(Registry.load(), "qwen3-8b", Tiers(Settings(), {}).pool)
    pool = router.find("gemma-3-27b-a100").pool
    pool.check("gemma-3-27b")

    assert pool.location == "A100-80GB"
    assert router.find("gemma-3-27b-a100-80gb").pool is pool
    with pytest.raises(AssertionError, match="app vllm-gemma-3-27b-a100 is asked for"):
        asyncio.run(pool.wake())
