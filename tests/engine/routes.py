"""The routes that the service has, those that it must not have, and how to ask for one exactly as it is written."""

from __future__ import annotations

import http.client
import json
import re
import socket
import typing
from collections.abc import Mapping
from typing import Any

import requests
from vllm_service import http_contract
from vllm_service.http_contract import Protocol

# path -> methods of an engine; read once, so that a test may weaken the guard's contract and still compare with the
# whole one
ALLOWED = {
    path: {method for method, route in routes.items() if not route.gateway_only}
    for path, routes in http_contract.ROUTES.items()
    if not all(route.gateway_only for route in routes.values())
}
SERVED = {path: set(routes) for path, routes in http_contract.ROUTES.items()}  # by the gateway: its own routes too
# Routes that vLLM has had in some mode or version, whether the running one has them or not.
KNOWN = [
    "/invocations",
    "/version",
    "/load",
    "/ping",
    "/sleep",
    "/wake_up",
    "/is_sleeping",
    "/reset_prefix_cache",
    "/collective_rpc",
    "/generative_scoring",
    "/inference/v1/generate",
    "/inference/v1/abort_requests",
    "/scale_elastic_ep",
    "/is_scaling_elastic_ep",
    "/v1/chat/completions/render",
    "/v1/completions/render",
    "/v1/chat/completions/batch",
    "/pooling",
    "/score",
    "/rerank",
    "/v2/rerank",
    "/v2/embed",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/v1/realtime",
    "/start_profile",
    "/stop_profile",
    "/server_info",
    "/pause",
    "/resume",
    "/abort_requests",
    "/init_weight_transfer_engine",
    "/update_weights",
    "/get_world_size",
    "/kv_event_sources",
    "/v1/systemone",
    "/redoc",
    "/docs/oauth2-redirect",
    "/cohere/v2/chat",
    "/metrics/x",
    "/metricsx",
]
# Other ways to write a path that is refused, or one that is allowed.
DISGUISES = [
    "//invocations",
    "///v1/models",
    "/%69nvocations",
    "/invocations/",
    "/v1/../invocations",
    "/v1/models/../../invocations",
    "/health/../version",
    "/health//",
    "/health;x",
    "/v1/chat/completions//",
    "/V1/MODELS",
    "/v1//models/",
    "/v1/responses/a/b",
    "/v1/responses/a/cancel/x",
    "/v1/responses/..%2f..%2finvocations",
    "/v1/chat/completions%2frender",
    "/health%00",
]


class Listener(typing.Protocol):
    """A service or an engine: what listens on a port of this machine."""

    @property
    def port(self) -> int:
        """Where."""


def registered_routes(log: str, url: str, headers: Mapping[str, str] | None = None) -> dict[str, set[str]]:
    """Return path -> methods of every route of a running application: those that it logs, and those that it describes.

    Args:
        log: The output of an engine: at its start vLLM writes a line for each route of its application.
        url: Where to read `/openapi.json`.
        headers: The key that it needs there.
    """
    routes: dict[str, set[str]] = {}
    for path, methods in re.findall(r"Route: (\S+), (?:Methods: ([A-Z, ]+)|Endpoint: )", log):
        routes.setdefault(path, set()).update(methods.split(", ") if methods else ())
    described = requests.get(f"{url}/openapi.json", headers=headers, timeout=30).json()["paths"]
    for path, methods in described.items():
        routes.setdefault(path, set()).update(method.upper() for method in methods)
    return routes


def ask(service: Listener, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
    """Send a path exactly as it is written, and return status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    try:
        connection.request(method, path, body=body, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def ask_in_chunks(service: Listener, path: str, limit: int, **headers: str) -> int:
    """Post a body in chunks until it is over the limit, or refused, and return the status."""
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    lines = {"Host": "localhost", "Content-Type": "application/json", "Transfer-Encoding": "chunked", **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode())
        for _ in range(limit // 65536 + 1):
            connection.sendall(chunk)
        return int(connection.recv(4096).split(b" ")[1])


def error_of(body: bytes, path: str = "") -> dict[str, Any]:
    """Return the error of an answer in the shape of the path's protocol, and nothing beside it."""
    answer = json.loads(body)
    error = answer["error"]
    if http_contract.protocol_of(path) is Protocol.ANTHROPIC:
        assert set(answer) == {"type", "error", "request_id"}
        assert answer["type"] == "error"
        assert set(error) == {"type", "message"}
        assert answer["request_id"]
    else:
        assert set(answer) == {"error"}
        assert set(error) == {"message", "type", "param", "code"}
        assert re.fullmatch("[a-z_]+", error["code"])
    assert error["message"]
    return dict(error)
