"""LiteLLM's proxy from its own package, started as the example's compose file has it, with what the command writes.

OpenAI's client talks to the proxy, the proxy to the gateway, the gateway to the real engine.
"""

from __future__ import annotations

import socket
from typing import Any

import pytest
import requests

from tests.engine.running import Service

from . import clients
from .clients import BROKEN, CALL, CHOICES, CONTINUATION, COUNT, JOHN, KEY, LiteLLM, Outcomes, bearer, counted

MODEL = "tiny-l4"  # <key>-<gpu>
MEMORY_MB = 800  # 330 measured


def _chat(litellm: LiteLLM, key: str | None = LiteLLM.MASTER_KEY, **fields: Any) -> requests.Response:
    headers = bearer(key) if key else {}
    return requests.post(
        f"{litellm.url}/v1/chat/completions", json={**COUNT.request, **fields}, headers=headers, timeout=60
    )


@pytest.fixture(scope="module")
def outcomes(litellm: LiteLLM) -> Outcomes:
    """The results of the cases of OpenAI's client."""
    return clients.outcomes(clients.python("openai_client.py"), litellm.url, litellm.MASTER_KEY, MODEL)


def test_litellm_chat_returns_the_known_answer(outcomes: Outcomes) -> None:
    """A whole answer."""
    chat = outcomes.value("chat")
    assert (chat["text"], chat["ended"]) == (COUNT.content, "stop")


def test_litellm_stream_adds_up_to_the_whole_answer(outcomes: Outcomes) -> None:
    """The deltas add up, and the last chunk has the usage."""
    assert outcomes.value("stream") == outcomes.value("chat") | {"in_pieces": True}


def test_litellm_completion_continues_the_prompt(outcomes: Outcomes) -> None:
    """Whole and streamed; it stays a completion and does not become a chat."""
    assert outcomes.value("completion") == outcomes.value("completion_stream") == CONTINUATION


def test_litellm_json_schema_fits(outcomes: Outcomes) -> None:
    """LiteLLM forwards `response_format`."""
    assert outcomes.value("schema") == JOHN


def test_litellm_choice_is_one_of_the_choices(outcomes: Outcomes) -> None:
    """LiteLLM forwards vLLM's own field."""
    assert outcomes.value("choice") in CHOICES


def test_litellm_models_are_those_of_its_file(outcomes: Outcomes) -> None:
    """Every model by its key, with its GPU behind it, and with the suffix for tool calls."""
    assert {"llm", "tiny", MODEL, "tiny-local", "qwen3-8b", "qwen3-8b-h100"} <= set(outcomes.value("models"))


def test_litellm_local_name_calls_the_tool(litellm: LiteLLM) -> None:
    """The suffix reaches the gateway, and the key alone is a name too."""
    for model in ("tiny-local", "tiny"):
        found = clients.outcomes(clients.python("openai_client.py"), litellm.url, litellm.MASTER_KEY, model, ["tools"])
        assert found.value("tools") == CALL


def test_litellm_without_its_key_rejects_requests(litellm: LiteLLM, outcomes: Outcomes) -> None:
    """A request without a key, with a wrong key or with the gateway's key is rejected."""
    nobody = _chat(litellm, None, model="tiny")
    assert nobody.status_code == 401, nobody.text
    for key in ("sk-wrong", KEY):
        refused = clients.outcomes(clients.python("openai_client.py"), litellm.url, key, "tiny", ["chat"])
        assert refused.raised("chat")[1] in {400, 401}  # 400: it looks for further keys in a database it has not


def test_litellm_invalid_request_gets_the_gateways_message(litellm: LiteLLM) -> None:
    """A field that vLLM has removed is 400, and the message names it."""
    answer = _chat(litellm, model="tiny", guided_choice=["a"])
    assert answer.status_code == 400, answer.text
    assert "guided_choice" in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_litellm_model_that_cannot_start_is_requested_once(litellm: LiteLLM, served: Service, stream: bool) -> None:
    """LiteLLM does not retry; the client gets the reason, after LiteLLM has waited long enough for a cold pool."""
    before = counted(served, "gateway_requests_total", key="clients", model=BROKEN, status="503")
    answer = _chat(litellm, model=BROKEN, stream=stream)
    assert answer.status_code == 503, answer.text
    assert "has no config.json" in answer.json()["error"]["message"]
    assert float(answer.headers["x-litellm-timeout"]) == 3720
    assert counted(served, "gateway_requests_total", key="clients", model=BROKEN, status="503") == before + 1


def test_litellm_health_sends_no_request_to_models(litellm: LiteLLM) -> None:
    """LiteLLM's `/health` wakes no pool."""
    health = requests.get(f"{litellm.url}/health", headers=bearer(litellm.MASTER_KEY), timeout=60).json()
    assert (health["healthy_count"], health["unhealthy_count"]) == (0, 0)


def test_litellm_makes_no_outside_connection(litellm: LiteLLM, outcomes: Outcomes, elsewhere: socket.socket) -> None:
    """LiteLLM fetches no price list, headers or news; the test would receive all its HTTPS requests."""
    with pytest.raises(BlockingIOError):
        elsewhere.accept()


def test_litellm_file_has_no_key(litellm: LiteLLM) -> None:
    """The file names the variables that hold the keys."""
    assert KEY not in litellm.config
    assert litellm.MASTER_KEY not in litellm.config


def test_litellm_fits_beside_the_engine(litellm: LiteLLM, outcomes: Outcomes) -> None:
    """A machine that runs the example needs no more than that for it."""
    assert litellm.memory_mb < MEMORY_MB
