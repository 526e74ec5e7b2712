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
from .clients import CALL, CAPITAL, CHOICES, CONTINUATION, GIANT, JOHN, KEY, LiteLLM, Outcomes, bearer, counted

MODEL = "tiny-l4"  # <key>-<gpu>
MEMORY_MB = 800  # 330 measured


def _chat(litellm: LiteLLM, key: str | None = LiteLLM.MASTER_KEY, **fields: Any) -> requests.Response:
    headers = bearer(key) if key else {}
    return requests.post(
        f"{litellm.url}/v1/chat/completions", json={**CAPITAL.request, **fields}, headers=headers, timeout=60
    )


@pytest.fixture(scope="module")
def said(litellm: LiteLLM) -> Outcomes:
    """What became of the cases of OpenAI's client."""
    return clients.outcomes(clients.python("openai_client.py"), litellm.url, litellm.MASTER_KEY, MODEL)


def test_litellm_chat_gives_the_words(said: Outcomes) -> None:
    """A whole answer."""
    chat = said.value("chat")
    assert (chat["text"], chat["ended"]) == (CAPITAL.content, "stop")


def test_litellm_stream_gives_the_same_in_pieces(said: Outcomes) -> None:
    """The deltas add up, and the last chunk has the usage."""
    assert said.value("stream") == said.value("chat") | {"in_pieces": True}


def test_litellm_completion_continues_the_prompt(said: Outcomes) -> None:
    """Whole and streamed; it stays a completion and does not become a chat."""
    assert said.value("completion") == said.value("completion_stream") == CONTINUATION


def test_litellm_json_schema_fits(said: Outcomes) -> None:
    """`response_format` is not dropped on the way."""
    assert said.value("schema") == JOHN


def test_litellm_choice_is_one_of_the_choices(said: Outcomes) -> None:
    """Nor is vLLM's own field."""
    assert said.value("choice") in CHOICES


def test_litellm_models_are_those_of_its_file(said: Outcomes) -> None:
    """Every model by its key, with its GPU behind it, and with the suffix for tool calls."""
    assert {"llm", "tiny", MODEL, "tiny-local", "qwen3-8b", "qwen3-8b-h100"} <= set(said.value("models"))


def test_litellm_local_name_calls_the_tool(litellm: LiteLLM) -> None:
    """The suffix reaches the gateway, and the key alone is a name too."""
    for model in ("tiny-local", "tiny"):
        found = clients.outcomes(clients.python("openai_client.py"), litellm.url, litellm.MASTER_KEY, model, ["tools"])
        assert found.value("tools") == CALL


def test_litellm_without_its_key_is_closed(litellm: LiteLLM, said: Outcomes) -> None:
    """Neither nobody nor a stranger gets an answer, nor does the gateway's key open the proxy."""
    nobody = _chat(litellm, None, model="tiny")
    assert nobody.status_code == 401, nobody.text
    for key in ("sk-wrong", KEY):
        refused = clients.outcomes(clients.python("openai_client.py"), litellm.url, key, "tiny", ["chat"])
        assert refused.raised("chat")[1] in {400, 401}  # 400: it looks for further keys in a database it has not


def test_litellm_wrong_request_gets_the_gateways_words(litellm: LiteLLM) -> None:
    """A field that vLLM no longer has is 400, and the sentence names it."""
    answer = _chat(litellm, model="tiny", guided_choice=["a"])
    assert answer.status_code == 400, answer.text
    assert "guided_choice" in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_litellm_model_that_cannot_start_is_asked_for_once(litellm: LiteLLM, served: Service, stream: bool) -> None:
    """Nothing on the way retries: only the client may, and it is told why. There was time enough for a cold pool."""
    before = counted(served, "gateway_requests_total", key="clients", model=GIANT, status="503")
    answer = _chat(litellm, model=GIANT, stream=stream)
    assert answer.status_code == 503, answer.text
    assert "this machine has" in answer.json()["error"]["message"]
    assert float(answer.headers["x-litellm-timeout"]) == 3720
    assert counted(served, "gateway_requests_total", key="clients", model=GIANT, status="503") == before + 1


def test_litellm_health_of_all_models_asks_none(litellm: LiteLLM) -> None:
    """Its `/health` would else wake every pool there is."""
    health = requests.get(f"{litellm.url}/health", headers=bearer(litellm.MASTER_KEY), timeout=60).json()
    assert (health["healthy_count"], health["unhealthy_count"]) == (0, 0)


def test_litellm_asks_nobody_outside(litellm: LiteLLM, said: Outcomes, elsewhere: socket.socket) -> None:
    """No price list, no headers, no news is fetched: whatever leaves over HTTPS would have come here."""
    with pytest.raises(BlockingIOError):
        elsewhere.accept()


def test_litellm_file_has_no_key(litellm: LiteLLM) -> None:
    """It names the variables."""
    assert KEY not in litellm.config
    assert litellm.MASTER_KEY not in litellm.config


def test_litellm_fits_beside_the_engine(litellm: LiteLLM, said: Outcomes) -> None:
    """A machine that runs the example needs no more than that for it."""
    assert litellm.memory_mb < MEMORY_MB
