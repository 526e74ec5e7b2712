"""The gateway in front of the real routes of vLLM: what is not on the list does not exist, and bodies have a limit."""

from __future__ import annotations

import http.client
import json
import re
import socket

import pytest
from vllm_service import http_contract

from .routes import ALLOWED, DISGUISES, KNOWN, SERVED, ask, ask_in_chunks, error_of, registered_routes
from .running import Service

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
MIB = 1024 * 1024
NAMES = {"{file}": "main.js"}  # what stands in a path for what has to have an ending
WEBSOCKET = (
    "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


def own_routes(service: Service) -> dict[str, set[str]]:
    """Return path -> methods of every route: those that the engine logs, and those that the gateway describes."""
    return registered_routes(service.log_file.read_text(), service.url)


def test_gateway_every_route_of_the_engine_off_the_list_is_refused(tiny: Service) -> None:
    """All of vLLM's routes, by all methods: only what the list has is more than 404 or 405."""
    routes = own_routes(tiny)
    assert {"/invocations", "/version", "/load"} <= set(routes), "The engine's log no longer lists its routes."
    prefixes = tuple(SERVED.keys() - {"/"})
    for path in {*routes, *KNOWN}:
        served = SERVED.get(path.removesuffix("/") or "/", set())  # vLLM has a /metrics/
        for method in {*METHODS, *routes.get(path, ())} - served - {"HEAD", "OPTIONS"}:
            status, body = ask(tiny, method, re.sub(r"{\w+}", lambda name: NAMES.get(name[0], "x_1"), path))
            assert status in {404, 405}, f"{method} {path}: {status} {body!r}"
            assert status == 404 or path == "/" or path.startswith(prefixes), f"{method} {path}: {status} {body!r}"
            error_of(body, path)


def test_gateway_list_has_what_the_engine_serves(tiny: Service) -> None:
    """Every route of the list is one of the running engine, so that none is stale, but those of other tasks."""
    routes = own_routes(tiny)
    missing = {path for path, methods in ALLOWED.items() if not methods <= routes.get(path, set())}
    tasks = {path: next(iter(listed.values())).tasks for path, listed in http_contract.ROUTES.items()}
    others = {path for path in tasks if tasks[path] and "generate" not in tasks[path]}
    assert missing <= {"/docs", "/openapi.json", "/metrics"} | others, missing


@pytest.mark.parametrize("path", DISGUISES)
def test_gateway_disguised_path_is_refused(tiny: Service, path: str) -> None:
    """Doubled slashes, dots, escapes, capitals: what is not written as the list has it is not found."""
    for method in ("GET", "POST"):
        status, body = ask(tiny, method, path)
        assert status == 404, f"{method} {path}: {status} {body!r}"
        error_of(body)


def test_gateway_whole_url_as_path_is_refused(tiny: Service) -> None:
    """A request to a proxy, with the whole address in its first line, reaches nothing that is not listed."""
    status, _ = ask(tiny, "POST", f"http://127.0.0.1:{tiny.port}/invocations")
    assert status == 404


def test_gateway_404_names_the_path(tiny: Service) -> None:
    """The error says which route there is not and where to look."""
    status, body = ask(tiny, "POST", "/invocations", b"{}")
    assert status == 404
    assert "/invocations" in error_of(body)["message"]
    assert "/docs" in error_of(body)["message"]


@pytest.mark.parametrize(("path", "limit"), [("/v1/chat/completions", 32 * MIB), ("/tokenize", MIB // 2)])
def test_gateway_declared_body_over_the_limit_is_413(tiny: Service, path: str, limit: int) -> None:
    """A body that is declared too long is refused before a byte of it is sent."""
    connection = http.client.HTTPConnection("127.0.0.1", tiny.port, timeout=30)
    try:
        connection.putrequest("POST", path)
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(limit + 1))
        connection.endheaders()
        answer = connection.getresponse()
        assert answer.status == 413
        assert f" {'32 MiB' if limit > MIB else '512 KiB'} " in error_of(answer.read())["message"]
    finally:
        connection.close()


@pytest.mark.parametrize(("path", "limit"), [("/v1/chat/completions", 32 * MIB), ("/tokenize", MIB // 2)])
def test_gateway_chunked_body_over_the_limit_is_413(tiny: Service, path: str, limit: int) -> None:
    """A body of unknown length is refused once it is too long, and the service goes on."""
    assert ask_in_chunks(tiny, path, limit) == 413
    assert ask(tiny, "GET", "/health") == (200, b'{"status":"ok"}')


def test_gateway_body_within_the_limit_passes(tiny: Service) -> None:
    """White space of a quarter of a MiB is no reason to refuse."""
    body = b" " * (MIB // 4) + json.dumps({"model": "llm", "prompt": "hello"}).encode()
    status, answer = ask(tiny, "POST", "/tokenize", body, **{"Content-Type": "application/json"})
    assert status == 200
    assert json.loads(answer)["count"] > 0


@pytest.mark.parametrize("path", ["/v1/realtime", "/v1/chat/completions", "/health"])
def test_gateway_websocket_is_refused(tiny: Service, path: str) -> None:
    """No handshake succeeds, on a route that exists as on one that does not; Codex looks for 426."""
    with socket.create_connection(("127.0.0.1", tiny.port), timeout=30) as connection:
        connection.sendall(WEBSOCKET.format(path=path).encode())
        status = int(connection.recv(4096).split(b" ")[1])
    assert status == (404 if path == "/v1/realtime" else 426)


def test_gateway_options_and_head_give_nothing_away(tiny: Service) -> None:
    """HEAD of an open page works; OPTIONS and HEAD of a route off the list are 404."""
    assert ask(tiny, "HEAD", "/docs")[0] in {200, 405}
    assert ask(tiny, "OPTIONS", "/invocations")[0] == 404
    assert ask(tiny, "HEAD", "/version")[0] == 404
