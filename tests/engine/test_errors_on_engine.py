"""vLLM's own errors behind the guard, as on Modal's direct path: their shape, and what wrong values end with."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import requests

from service.engine.environment import EngineEnv

from .guarded import Guarded, guarded
from .routes import error_of
from .running import session_members, wait_until

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
COUNT = "/v1/messages/count_tokens"
CONTEXT = 2048  # of the tiny model
HUGE = 2**70
USER = {"messages": [{"role": "user", "content": "Hi"}]}
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {**USER, "max_tokens": 4},
    COMPLETIONS: {"prompt": "Hi", "max_tokens": 4},
    RESPONSES: {"input": "Hi", "max_output_tokens": 4},
    MESSAGES: {**USER, "max_tokens": 4},
}


def post(engine: Guarded, path: str, **fields: Any) -> requests.Response:
    """Post a body of these fields."""
    body = {"model": "llm", **BODIES.get(path, {}), **fields}
    return requests.post(f"{engine.url}{path}", json=body, headers=engine.headers, timeout=60)


def refused(answer: requests.Response, path: str) -> dict[str, Any]:
    """Return the error of an answer 400, or of the error event of a stream that stands for one."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.status_code == 400, answer.text
        return error_of(answer.content, path)
    data = next(line for line in answer.text.splitlines() if line.startswith("data: {") and '"error": {' in line)
    error: dict[str, Any] = json.loads(data.removeprefix("data: "))["error"]
    assert error["type"] == "invalid_request_error", answer.text
    assert error.get("status", 400) == 400
    return error


def long_prompt(path: str, tokens: int) -> dict[str, Any]:
    """Return the field with a prompt of at least so many tokens."""
    text = "hi " * tokens
    if path == COMPLETIONS:
        return {"prompt": text}
    return {"input": text} if path == RESPONSES else {"messages": [{"role": "user", "content": text}]}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES, COUNT])
@pytest.mark.parametrize("tokens", [CONTEXT + 1, 500_000], ids=["tokens", "characters"])
def test_prompt_over_the_context_has_the_words_that_agents_know(generating: Guarded, path: str, tokens: int) -> None:
    """`context_length_exceeded` for OpenAI's clients, "prompt is too long" for Anthropic's; vLLM's sentence is kept."""
    error = refused(post(generating, path, **long_prompt(path, tokens)), path)

    assert f"This model's maximum context length is {CONTEXT} tokens." in error["message"]
    if path in {MESSAGES, COUNT}:
        assert error["message"].startswith(f"prompt is too long: {CONTEXT + 1} tokens > {CONTEXT} maximum. ")
    else:
        assert error["code"] == "context_length_exceeded"


def test_prompt_that_fills_the_context_exactly_is_too_long(generating: Guarded) -> None:
    """There is no room for an answer; vLLM says that `max_tokens` must be at least 1."""
    error = refused(post(generating, COMPLETIONS, prompt=[5] * CONTEXT), COMPLETIONS)

    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert post(generating, COMPLETIONS, prompt=[5] * (CONTEXT - 1)).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"n": 17}, "n"),
        (CHAT, {"min_tokens": -1}, "min_tokens"),
        (CHAT, {"top_k": HUGE}, "top_k"),
        (CHAT, {"thinking_token_budget": HUGE}, "thinking_token_budget"),
        (CHAT, {"stream_interval": HUGE}, "stream_interval"),
        (CHAT, {"chat_template_kwargs": {"a": HUGE}}, "chat_template_kwargs"),
        (CHAT, {"structured_outputs": []}, "structured_outputs"),
        (CHAT, {"structured_outputs": "x"}, "structured_outputs"),
        (CHAT, {"vllm_xargs": "x"}, "vllm_xargs"),
        (COMPLETIONS, {"top_k": HUGE}, "top_k"),
        (COMPLETIONS, {"structured_outputs": []}, "structured_outputs"),
        (RESPONSES, {"top_k": HUGE}, "top_k"),
        (RESPONSES, {"structured_outputs": []}, "structured_outputs"),
        (MESSAGES, {"top_k": HUGE}, None),
        (MESSAGES, {"chat_template_kwargs": {"a": HUGE}}, None),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_value_that_the_engine_cannot_take_is_400_with_its_field(
    generating: Guarded, path: str, fields: dict[str, Any], param: str | None, stream: bool
) -> None:
    """Plain vLLM answers most of these with 500, and in streams with errors of its own making."""
    error = refused(post(generating, path, stream=stream, **fields), path)

    assert error.get("param") == param
    assert (param or next(iter(fields))) in error["message"]
    running = requests.get(f"{generating.url}/metrics", headers=generating.headers, timeout=30).text
    assert 'vllm:num_requests_running{engine="0",model_name="tiny"} 0.0' in running


@pytest.mark.parametrize("tools", [[], None])
@pytest.mark.parametrize("choice", ["auto", "none", None])
def test_request_with_an_empty_list_of_tools_is_answered(
    generating: Guarded, tools: object, choice: str | None
) -> None:
    """As if there were none, on every protocol; vLLM refuses it on some."""
    for path in (CHAT, RESPONSES, MESSAGES):
        chosen = {"tool_choice": {"type": choice} if path == MESSAGES else choice} if choice else {}
        answer = post(generating, path, tools=tools, **chosen)
        assert answer.status_code == 200, f"{path}: {answer.text}"
    refused(post(generating, CHAT, tools=tools, tool_choice="required"), CHAT)


def test_n_over_the_limit_is_told_the_services_setting(generating: Guarded) -> None:
    """Not vLLM's variable, which the service sets; a number without a fraction is an integer."""
    assert "To increase this limit, set SERVICE_MAX_N." in refused(post(generating, CHAT, n=17), CHAT)["message"]
    assert len(post(generating, CHAT, n=2.0).json()["choices"]) == 2


@pytest.mark.parametrize(
    ("path", "fields", "status", "code"),
    [
        (CHAT, {"model": "nope"}, 404, "model_not_found"),
        (CHAT, {"messages": "x"}, 400, "invalid_value"),
        (RESPONSES, {"previous_response_id": "resp_none"}, 404, "not_found"),
        (MESSAGES, {"model": "nope"}, 404, None),
        (MESSAGES, {"messages": "x"}, 400, None),
        ("/v1/embeddings", {"input": "x"}, 400, "unsupported_by_model"),
    ],
)
def test_error_of_vllm_has_the_shape_of_its_route(
    generating: Guarded, path: str, fields: dict[str, Any], status: int, code: str | None
) -> None:
    """A word as code where vLLM has an integer, and no shape of FastAPI's."""
    answer = post(generating, path, **fields)

    assert answer.status_code == status
    assert error_of(answer.content, path).get("code") == code


def test_requests_in_flight_when_the_core_dies_are_told_to_send_again(engine_env_: EngineEnv) -> None:
    """Whole answers and streams of every protocol end with a lost engine, and none with vLLM's 500."""
    asked = [(path, stream) for path in BODIES for stream in (False, True)]
    with guarded(engine_env_) as engine, ThreadPoolExecutor(len(asked)) as threads:
        core = next(process for process in session_members(engine.pid) if process.pid != engine.pid)
        core.suspend()  # it answers nothing, so that all of them are in flight
        clients = {one: threads.submit(post, engine, one[0], stream=one[1]) for one in asked}
        wait_until(lambda: _is_at_rest(engine, len(asked)), 60)
        core.kill()
        for (path, stream), client in clients.items():
            answer = client.result(30)
            assert "Send it again" in answer.text, (path, stream, answer.text)
            assert answer.status_code == (200 if stream else 502)
            if not stream:
                error = error_of(answer.content, path)
                assert error.get("code", "engine_lost") == "engine_lost"
                assert answer.headers["Retry-After"] == "1"
            elif path != MESSAGES:
                assert '"code": "engine_lost"' in answer.text
                assert '"code": 500' not in answer.text


def _is_at_rest(engine: Guarded, connections: int) -> bool:
    """Tell whether so many clients are connected and the API process has done all that it can for them."""
    process = psutil.Process(engine.pid)
    before = process.cpu_times()
    time.sleep(0.5)
    established = [one for one in process.net_connections("tcp") if one.status == psutil.CONN_ESTABLISHED]
    return process.cpu_times() == before and sum(one.laddr.port == engine.port for one in established) == connections
