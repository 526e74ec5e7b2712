"""A service on loopback that answers chats in a round of five ways: whole, refused, failed within, cut, whole."""

from __future__ import annotations

import itertools
import json
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

WAYS = ("whole", "refused", "failed", "cut", "whole")
CHUNKS = 8


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.turns = itertools.count()
        self.keys: set[str] = set()

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that are gone."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        """Answer what a service lists."""
        self._json(200 if self.path == "/v1/models" else 404, {"object": "list", "data": [{"id": "m"}]})

    def do_POST(self) -> None:
        """Answer a chat in its turn; the first one, which wakes the model, is whole."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.keys.add(self.headers.get("Authorization", ""))
        if not body.get("stream"):
            self._json(404, {"error": {"message": "no such route", "code": "not_found"}})
            return
        way = "whole" if body.get("max_tokens") == 1 else WAYS[next(self.server.turns) % len(WAYS)]
        if way == "refused":
            self._json(503, {"error": {"message": "It wakes.", "type": "server_error", "code": "model_waking"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for place in range(CHUNKS):
            time.sleep(0.005)
            self._event({"choices": [{"index": 0, "delta": {"content": "a "}}]})
            if place == 3 and way == "failed":
                self._event({"error": {"message": "It died.", "type": "server_error", "code": "engine_lost"}})
                break
            if place == 3 and way == "cut":
                self.connection.close()
                self.close_connection = True
                return
        else:
            self._event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": CHUNKS}})
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _event(self, event: object) -> None:
        self._chunk(b"data: " + json.dumps(event).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _json(self, status: int, answer: object) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def failing_service(tls: ssl.SSLContext | None = None) -> Iterator[tuple[str, set[str]]]:
    """Serve until the block ends; give the URL, and the `Authorization` headers that come."""
    server = _Server()
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"{'https://localhost' if tls else 'http://127.0.0.1'}:{server.server_port}", server.keys
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
