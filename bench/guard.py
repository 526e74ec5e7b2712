"""What the guard adds to a request without constraints: its processor time, without sockets and without vLLM.

Each request goes through the guard to an application that answers at once, and to that application alone, in turns.
The least of many rounds counts: whatever else runs on the machine only adds to a round.

Run by `make bench-guard`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import time

from vllm_service.guard import App, Guard, Message, Receive, Send

from bench.report import Report

LIMIT_US = 20.0
ROUNDS, REQUESTS = 30, 2000
EVENTS = 16
KEY = "sk-bench"
_MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant. " * 8},
    {"role": "user", "content": "What is the capital of France?"},
]
BODY = json.dumps({"model": "llm", "messages": _MESSAGES, "max_tokens": 64, "temperature": 0.7}).encode()
_EVENT = b'data: {"id":"chatcmpl-1","choices":[{"index":0,"delta":{"content":"Paris"}}]}\n\n'
_HEADERS = [
    (b"host", b"127.0.0.1:8000"),
    (b"authorization", f"Bearer {KEY}".encode()),
    (b"content-type", b"application/json"),
    (b"content-length", str(len(BODY)).encode()),
    (b"x-request-id", b"0123456789abcdef0123456789abcdef"),
    (b"x-api-client", b"alice"),
]


def answering(content_type: bytes, pieces: list[bytes]) -> App:
    """Return an application that reads the body and answers."""
    start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", content_type)]}

    async def app(scope: Message, receive: Receive, send: Send) -> None:  # noqa: ARG001 - it is ASGI
        while (await receive()).get("more_body"):
            pass
        await send(start)
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return app


async def request(app: App) -> None:
    """Make one request."""
    scope: Message = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": _HEADERS.copy()}

    async def receive() -> Message:
        return {"type": "http.request", "body": BODY, "more_body": False}

    async def send(message: Message) -> None:
        pass

    await app(scope, receive, send)


async def added_us(app: App) -> float:
    """Return the microseconds of processor time that the guard adds to a request of an application."""
    guarded = Guard(app, [hashlib.sha256(KEY.encode()).hexdigest()])
    least = dict.fromkeys(("guarded", "alone"), float("inf"))
    for _ in range(ROUNDS):
        for name, served in (("guarded", guarded), ("alone", app)):
            begun = time.process_time()
            for _ in range(REQUESTS):
                await request(served)
            least[name] = min(least[name], time.process_time() - begun)
    return (least["guarded"] - least["alone"]) / REQUESTS * 1e6


def main() -> int:
    """Measure, print the figures and save them."""
    report = Report("guard")
    stream = b"text/event-stream; charset=utf-8"
    for name, app, limit_us in (
        ("a request", answering(b"application/json", [b"{}"]), LIMIT_US),
        ("a stream, before its events", answering(stream, []), LIMIT_US),
        (f"a stream of {EVENTS} events", answering(stream, [_EVENT] * EVENTS), None),
    ):
        report.add(f"the guard adds to {name}", round(asyncio.run(added_us(app)), 2), limit_us, "us")
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
