"""The guard alone in front of real engines, as on Modal: no gateway answers any of these requests."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import requests

from service.engine.environment import EngineEnv
from service.gateway import openapi
from tests.described import is_same
from tools import engine_openapi

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
    "/v1/rerank": {"query": "Hi", "documents": ["a", "b"]},
    "/v1/score": {"queries": "Hi", "documents": ["a", "b"]},
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
    """Every route of the list is one of a running engine, so that none is stale; tests/clients asks those of others."""
    registered = {(path, method) for one in (generating, pooling) for path in one.routes for method in one.routes[path]}
    of_others = {"/classify", "/v1/audio/transcriptions", "/v1/audio/translations"}
    listed = {(path, method) for path, methods in ALLOWED.items() for method in methods if path not in of_others}
    assert listed <= registered, listed - registered


def test_openapi_of_the_package_is_that_of_the_engines(generating: Guarded, pooling: Guarded) -> None:
    """Requests and their schemas are the same; where this fails, `make openapi` writes the file anew."""
    kept = json.loads((openapi.DIRECTORY / "engine.json").read_text())
    seen = set[str]()
    for engine in (generating, pooling):
        document = requests.get(f"{engine.url}/openapi.json", headers=engine.headers, timeout=30).json()
        found = engine_openapi.requests_of(document)
        for path, methods in found["paths"].items():
            for method, operation in methods.items():
                known = {name: kept["paths"][path][method].get(name) for name in operation}
                assert is_same(known, operation, kept["schemas"], found["schemas"], set()), path
        seen |= found["paths"].keys()
    assert len(seen) >= 10
    assert seen <= kept["paths"].keys()


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
    """By the listed methods, with a key where the engine has keys: vLLM answers, be it that a body is missing.

    Where that is a form the guard says so itself.
    """
    passed = [case for case in all_cases(generating, pooling, engine.key) if not case.expected]
    counted = [case for case in passed if not case.path.startswith(("/health", "/metrics", "/v1/audio/"))]
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
    ("path", "body"),
    [
        ("/v1/chat/completions", {**QUESTION, "chat_template": "{{ 7*7 }}"}),
        ("/v1/chat/completions", {**QUESTION, "chat_template_kwargs": {"chat_template": "{{ 7*7 }}"}}),
        ("/tokenize", {"messages": QUESTION["messages"], "chat_template": "{{ 7*7 }}"}),
        ("/v1/chat/completions", {**QUESTION, "mm_processor_kwargs": {"trust_remote_code": True}}),
        ("/v1/chat/completions", {**QUESTION, "media_io_kwargs": {"image": {"image_mode": None}}}),
        ("/v1/completions", {"prompt_embeds": "gAR9lC4="}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "prompt_embeds", "data": "gA"}]}]},
        ),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"image_url": "file:///etc/passwd"}]}]}),
    ],
    ids=["template", "template in kwargs", "template of tokenize", "processor", "media", "embeds", "part", "file"],
)
def test_guard_field_that_could_run_or_read_something_is_refused(
    generating: Guarded, path: str, body: dict[str, Any]
) -> None:
    """Templates and pickles of clients, processors' options, files: off, and no entry's arguments switch them on."""
    answer = requests.post(
        f"{generating.url}{path}", json={"model": "llm", **body}, headers=generating.headers, timeout=60
    )
    assert answer.status_code == 400, answer.text


def test_guard_text_over_the_context_of_an_embedding_model_is_refused_with_its_code(pooling: Guarded) -> None:
    """As for the models that write; the field is `input`."""
    for text in ("hi " * 3000, [5] * 3000, "h" * 2_000_000):
        answer = requests.post(f"{pooling.url}/v1/embeddings", json={"model": "llm", "input": text}, timeout=60)
        error = error_of(answer.content)
        assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "input")


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
def test_guard_accepts_every_key_in_every_header(generating: Guarded, key: str) -> None:
    """As Bearer, as x-api-key beside a stale Bearer, and as api-key; the model answers."""
    stale = {"Authorization": "Bearer stale"}
    for headers in ({"Authorization": f"Bearer {key}"}, {**stale, "x-api-key": key}, {"api-key": key}):
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
    """White space of a quarter of a MiB is no reason to refuse."""
    body = b" " * (MIB // 4) + json.dumps({"model": "llm", "prompt": "hello"}).encode()
    status, answer = ask(engine, "POST", "/tokenize", body, **{"Content-Type": "application/json"}, **engine.headers)
    assert status == 200
    assert json.loads(answer)["count"] > 0


def test_guard_whole_url_as_path_is_refused(engine: Guarded) -> None:
    """A request to a proxy, with the whole address in its first line, reaches nothing that is not listed."""
    target = f"http://127.0.0.1:{engine.port}/invocations"
    assert ask(engine, "POST", target, b"{}", **engine.headers)[0] == 404


def test_guard_takes_no_key_from_a_trailer(generating: Guarded) -> None:
    """What comes after a chunked body is no header, of this request or the next."""
    head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    request = head + b"2\r\n{}\r\n0\r\nAuthorization: Bearer %b\r\n\r\n" % (generating.key or "").encode()
    assert raw_statuses(generating, request + request) == [401, 401]


def test_guard_length_of_5000_digits_is_400(generating: Guarded) -> None:
    """Python refuses to read such a number."""
    head = f"POST /tokenize HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {generating.key}\r\nContent-Length: "
    assert raw_statuses(generating, head.encode() + b"0" * 5000 + b"2\r\n\r\n{}") == [400]


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "\xff", %b}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\xff"}], "prompt": "\xff", "input": "\xff"}',
        b'{"response_format": {"type": "json_schema", "json_schema": {"name": "\xff", "schema": {}}}, %b}',
        b'{"tools": [{"type": "function", "function": {"name": "a", "parameters": {"x": "\xed\xa0\x80"}}}], %b}',
        b'{"metadata": {"\xff": 1}, %b}',
        b'{"user": "\\ud800", %b}',
        b"\xff\xfe{",
    ],
)
def test_guard_body_of_invalid_text_is_400_on_every_route(generating: Guarded, body: bytes) -> None:
    """No byte of a body makes a 500; where vLLM does not read the text, it may answer."""
    rest = b'"messages": [{"role": "user", "content": "hi"}], "prompt": "hi", "input": "hi", "max_tokens": 1'
    headers = {**generating.headers, "Content-Type": "application/json"}
    for path in BODIES:
        sent = body % rest if b"%b" in body else body
        answer = requests.post(f"{generating.url}{path}", data=sent, headers=headers, timeout=60)
        assert answer.status_code in {200, 400, 404}, f"{path}: {answer.status_code} {answer.text}"


def raw_statuses(engine: Guarded, sent: bytes) -> list[int]:
    """Send these bytes and return the statuses of what comes back within a second of silence."""
    got = b""
    with (
        socket.create_connection(("127.0.0.1", engine.port), timeout=1) as connection,
        contextlib.suppress(TimeoutError),
    ):
        connection.sendall(sent)
        while more := connection.recv(65536):
            got += more
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d+) ", got)]


HEALTH = b"GET /health HTTP/1.1\r\nHost: a\r\n"
SHORT = b"ab: 1\r\n" * 15_000  # 2 MB of memory


@pytest.mark.parametrize(
    ("piece", "count"),
    [
        (HEALTH + b"X: " + b"x" * 120_000, 800),
        (HEALTH + SHORT, 60),
        (HEALTH + b"\r\n" + HEALTH + SHORT, 60),
        (HEALTH + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n" + SHORT, 60),
    ],
    ids=["long value", "short headers", "second request", "trailers"],
)
def test_guard_incomplete_heads_are_bounded_in_all(generating: Guarded, piece: bytes, count: int) -> None:
    """Without a key too: the oldest end, a head in two pieces is served meanwhile, and those that left do not count."""
    before = psutil.Process(generating.pid).memory_info().rss
    with contextlib.ExitStack() as stack:
        address = ("127.0.0.1", generating.port)
        held = [stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(count)]
        for connection in held:
            connection.sendall(piece)
        assert raw_statuses(generating, HEALTH + b"\r\n") == [200]
        got = [b"too_many_bytes" in _now(connection) for connection in held]
        assert got == sorted(got, reverse=True)
        assert count // 5 < sum(got) < count
        assert psutil.Process(generating.pid).memory_info().rss - before < 160 * MIB
    assert raw_statuses(generating, HEALTH + SHORT[:7_000] + b"\r\n") == [200]


def _now(connection: socket.socket) -> bytes:
    """Return what has arrived."""
    connection.settimeout(0.05)
    got = b""
    with contextlib.suppress(TimeoutError, ConnectionError):
        while more := connection.recv(65536):
            got += more
    return got


@pytest.mark.parametrize("path", ["/v1/realtime", "/v1/chat/completions", "/health"])
def test_guard_websocket_is_refused(engine: Guarded, path: str) -> None:
    """No handshake succeeds, on a route that exists as on one that does not, with a key too; Codex looks for 426."""
    with socket.create_connection(("127.0.0.1", engine.port), timeout=30) as connection:
        connection.sendall(WEBSOCKET.format(path=path, key=engine.key or "none").encode())
        assert int(connection.recv(4096).split(b" ")[1]) == 426
