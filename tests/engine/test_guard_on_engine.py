"""The guard alone in front of real engines, as on Modal: no gateway answers any of these requests."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import requests

from service.engine.environment import EngineEnv

from .dialogues import QUESTION, dialogue
from .exposure import BODY_LIMIT, BODY_LIMITS, MIB, Case, cases, violations
from .guarded import KEYS, POOLING, Guarded, guarded
from .routes import ALLOWED, ask, ask_in_chunks, error_of
from .running import session_members

# Each with a body of its own; the two that name a stored response are answered by vLLM in words.
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": QUESTION,
    "/v1/completions": {"prompt": "Once", "max_tokens": 1},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 1},
    "/v1/messages": {"max_tokens": 1, **QUESTION},
    "/v1/messages/count_tokens": QUESTION,
    "/v1/embeddings": {"input": "Hi"},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1, 2]},
}
WEBSOCKET = (
    "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    "Authorization: Bearer {key}\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


@pytest.fixture(scope="module")
def pooling(engine_env_: EngineEnv) -> Iterator[Guarded]:
    """An embedding engine without keys: what a deployment has that leaves authentication to Modal."""
    with guarded(engine_env_, extra_args=POOLING) as engine:
        yield engine


@pytest.fixture(params=["generating", "pooling"])
def engine(request: pytest.FixtureRequest) -> Guarded:
    """Each of the two."""
    engine: Guarded = request.getfixturevalue(request.param)
    return engine


def all_cases(generating: Guarded, pooling: Guarded, key: str | None) -> list[Case]:
    """Return the requests for every route of both engines."""
    return list(cases({*generating.routes, *pooling.routes}, key))


def test_guard_routes_under_test_are_those_of_the_running_applications(generating: Guarded, pooling: Guarded) -> None:
    """The lists of the applications are complete enough to hold the routes that vLLM's own key leaves open."""
    assert {"/invocations", "/generative_scoring", "/version", "/load", "/scale_elastic_ep"} <= set(generating.routes)
    assert {"/invocations", "/pooling", "/score", "/rerank", "/v2/embed", "/v1/embeddings"} <= set(pooling.routes)


def test_guard_list_has_only_what_an_engine_serves(generating: Guarded, pooling: Guarded) -> None:
    """Every route of the list is one of a running engine, so that none is stale."""
    registered = {(path, method) for one in (generating, pooling) for path in one.routes for method in one.routes[path]}
    listed = {(path, method) for path, methods in ALLOWED.items() for method in methods}
    assert listed <= registered, listed - registered


def test_guard_refuses_everything_else_without_asking_vllm(
    engine: Guarded, generating: Guarded, pooling: Guarded
) -> None:
    """Unlisted routes, other methods, absent and wrong keys, long bodies: the guard's own error, and vLLM sees none."""
    refused = [case for case in all_cases(generating, pooling, engine.key) if case.expected]
    assert len({case.path for case in refused}) > 80
    before = engine.requests_seen()
    with engine.asking() as asker:
        assert violations(asker, refused) == []
    assert engine.requests_seen() == before


def test_guard_passes_listed_routes_to_vllm(engine: Guarded, generating: Guarded, pooling: Guarded) -> None:
    """By the listed methods, with a key where the engine has keys: vLLM answers, be it that a body is missing."""
    passed = [case for case in all_cases(generating, pooling, engine.key) if not case.expected]
    counted = [case for case in passed if not case.path.startswith(("/health", "/metrics"))]
    before = engine.requests_seen()
    with engine.asking() as asker:
        assert violations(asker, passed) == []
    assert engine.requests_seen() == before + len(counted)


def test_guard_listed_route_is_answered(engine: Guarded) -> None:
    """Each listed route that the engine has answers a good request."""
    for path in BODIES.keys() & engine.routes.keys():
        body = {"model": "llm", **BODIES[path]}
        answer = requests.post(engine.url + path, json=body, headers=engine.headers, timeout=60)
        assert answer.status_code == 200, f"{path}: {answer.text}"
    for path in ("/health", "/docs", "/openapi.json", "/v1/models", "/metrics"):
        assert requests.get(engine.url + path, headers=engine.headers, timeout=30).status_code == 200, path
    assert ask(engine, "GET", "/health") == (200, b'{"status":"ok"}')


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer "},
        {"Authorization": f"Basic {KEYS[0]}"},
        {"Authorization": KEYS[0]},
        {"x-api-key": "wrong"},
        {"x-api-key": ""},
        {"Authorization": f"Bearer {KEYS[0]}x"},
    ],
    ids=["none", "wrong", "empty", "basic", "bare", "wrong x-api-key", "empty x-api-key", "longer"],
)
def test_guard_without_a_right_key_is_401(generating: Guarded, headers: dict[str, str]) -> None:
    """No key or a wrong one is 401 in OpenAI's shape, says how to send one, and repeats nothing of it."""
    refused = requests.post(
        f"{generating.url}/v1/chat/completions", json={"model": "llm", **QUESTION}, headers=headers, timeout=60
    )
    assert refused.status_code == 401
    assert refused.headers["WWW-Authenticate"] == "Bearer"
    assert error_of(refused.content)["code"] == "invalid_api_key"
    assert not any(key in refused.text for key in KEYS)


@pytest.mark.parametrize("key", KEYS, ids=range(len(KEYS)))
def test_guard_accepts_every_key_in_both_headers(generating: Guarded, key: str) -> None:
    """As Bearer and as x-api-key, and the model answers."""
    for headers in ({"Authorization": f"Bearer {key}"}, {"x-api-key": key}):
        body = {"model": "llm", **QUESTION}
        answer = requests.post(f"{generating.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"].strip() == dialogue("capital").content


def test_guard_keys_are_nowhere_in_the_engine(generating: Guarded) -> None:
    """No process of the engine has a key in its arguments or environment, and its output has none."""
    processes = session_members(generating.pid)
    assert len(processes) >= 2
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            seen = " ".join(process.cmdline()) + json.dumps(process.environ())
            assert not any(key in seen for key in KEYS), process
    assert not any(key in line for key in KEYS for line in generating.log.lines)


def test_guard_chunked_body_over_the_limit_is_413(engine: Guarded) -> None:
    """A body of unknown length is refused once it is too long, on every route that reads one; the engine goes on."""
    for path in BODIES.keys() & engine.routes.keys():
        assert ask_in_chunks(engine, path, BODY_LIMITS.get(path, BODY_LIMIT), **engine.headers) == 413, path
    assert ask(engine, "GET", "/health") == (200, b'{"status":"ok"}')


def test_guard_body_within_the_limit_passes(engine: Guarded) -> None:
    """White space of half a MiB is no reason to refuse."""
    body = b" " * (MIB // 2) + json.dumps({"model": "llm", "prompt": "hello"}).encode()
    status, answer = ask(engine, "POST", "/tokenize", body, **{"Content-Type": "application/json"}, **engine.headers)
    assert status == 200
    assert json.loads(answer)["count"] > 0


def test_guard_whole_url_as_path_is_refused(engine: Guarded) -> None:
    """A request to a proxy, with the whole address in its first line, reaches nothing that is not listed."""
    target = f"http://127.0.0.1:{engine.port}/invocations"
    assert ask(engine, "POST", target, b"{}", **engine.headers)[0] == 404


@pytest.mark.parametrize("path", ["/v1/realtime", "/v1/chat/completions", "/health"])
def test_guard_websocket_is_refused(engine: Guarded, path: str) -> None:
    """No handshake succeeds, on a route that exists as on one that does not, with a key too."""
    with socket.create_connection(("127.0.0.1", engine.port), timeout=30) as connection:
        connection.sendall(WEBSOCKET.format(path=path, key=engine.key or "none").encode())
        assert int(connection.recv(4096).split(b" ")[1]) in {403, 404, 405}
