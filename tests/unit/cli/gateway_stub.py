"""A gateway that answers a chat as a test has it, and keeps what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL: dict[str, Any] = {
    "id": "llm",
    "display_name": "tiny",
    "state": "ready",
    "reason": None,
    "gpu": "cpu",
    "dollars_per_hour": None,
    "max_model_len": 40960,
}


@dataclass
class Stub:
    """What it answers, and what it was asked.

    Attributes:
        parts: Of a stream, as they are sent; None between two: wait until the test lets it go on.
        answer: Returns status, headers and body for the body of a request that is no stream; None: all are streams.
        bodies: Of the requests.
    """

    url: str = ""
    model: dict[str, Any] = field(default_factory=lambda: dict(MODEL))
    parts: Sequence[str | None] = ()
    answer: Callable[[Any], tuple[int, dict[str, str], Any]] | None = None
    bodies: list[Any] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    goes_on: threading.Event = field(default_factory=threading.Event)


def event(**delta: str) -> str:
    """Return an event of a stream."""
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta, 'finish_reason': None}]})}\n\n"


def ended(tokens: int, reason: str = "stop") -> str:
    """Return the last events of a stream."""
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}
    usage = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": tokens}}
    return f"data: {json.dumps(last)}\n\ndata: {json.dumps(usage)}\n\ndata: [DONE]\n\n"


@contextmanager
def serving(key: str = "", **fields: Any) -> Iterator[Stub]:
    """Serve until the block ends; with a key, requests without it are 401."""
    stub = Stub(**fields)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self._admits():
                listed = self.path == "/v1/models"
                self._answer(200, {}, {"object": "list", "data": [stub.model]} if listed else stub.model)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self._admits():
                return
            stub.bodies.append(body)
            stub.headers.append(dict(self.headers))
            if stub.answer:
                self._answer(*stub.answer(body))
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for part in stub.parts:
                if part is None:
                    stub.goes_on.wait(30)
                    continue
                self.wfile.write(part.encode())
                self.wfile.flush()

        def _admits(self) -> bool:
            stub.headers.append(dict(self.headers))
            if not key or self.headers.get("Authorization") == f"Bearer {key}":
                return True
            self._answer(401, {}, {"error": {"message": "An API key is needed."}})
            return False

        def _answer(self, status: int, headers: dict[str, str], body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.handle_error = lambda *_: None  # type: ignore[method-assign,assignment]  # a client that leaves is none
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        stub.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield stub
        finally:
            stub.goes_on.set()
            server.shutdown()
            thread.join()
