"""A stand-in for an engine that uses little processor time: OpenAI responses and streams from precomputed bytes.

A message in the request's body, which every proxy forwards unchanged, is an instruction how to respond:

    stub:answer <bytes> <ms>        a chat completion of that size, after that delay
    stub:stream <chunks> <rate>     that many chunks at that rate per second; rate 0: as fast as the client reads
    stub:idle 0 0                   the headers of a stream and one chunk, then nothing until the client disconnects

The stub keeps the first 4 KB of a body. Chunks that are due at the same time are written together, as an engine does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import socket
from collections.abc import Callable
from functools import cache
from typing import cast

import httptools
import uvloop

_KEPT = 4096
_TICK_S = 0.001
_BLOCK = 64  # chunks written together where there is no rate
_INSTRUCTION = re.compile(rb"stub:(answer|stream|idle) (\d+) (\d+)")
_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
_NOT_FOUND = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"
_BEGUN = {"id": "chatcmpl-stub", "created": 1_700_000_000, "model": "stub"}


def instruction(kind: str, first: int = 0, second: int = 0) -> str:
    """Return the message that makes the stub respond like this."""
    return f"stub:{kind} {first} {second}"


def event(delta: dict[str, str], reason: str | None = None) -> bytes:
    """Return one server-sent event of a chat's stream."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    return b"data: " + json.dumps({**_BEGUN, "object": "chat.completion.chunk", "choices": [choice]}).encode() + b"\n\n"


def _framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


_WORDS = ("all ", "had ", "one ", "two ", "but ", "now ", "who ", "yes ")  # a proxy ends a model that repeats itself
_CHUNKS = b"".join(_framed(event({"content": word})) for word in _WORDS * (_BLOCK // len(_WORDS)) * 2)
_SIZE = len(_CHUNKS) // (2 * _BLOCK)
_FIRST = _STREAM + _framed(event({"role": "assistant", "content": "so "}))
_LAST = _framed(event({}, "stop")) + _framed(b"data: [DONE]\n\n") + b"0\r\n\r\n"


@cache
def _json(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


@cache
def _answer(size: int) -> bytes:
    def body(text: str) -> bytes:
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        usage = {"prompt_tokens": 128, "completion_tokens": 200, "total_tokens": 328}
        return json.dumps({**_BEGUN, "object": "chat.completion", "choices": [choice], "usage": usage}).encode()

    return _json(body("x" * max(0, size - len(body("")))))


class Engine:
    """What all connections share: the streams in progress, and the timer that drives them."""

    def __init__(self) -> None:
        self.streams: set[Connection] = set()
        self._ticking = False

    def begin(self, stream: Connection) -> None:
        """Add a stream to those that the timer drives."""
        self.streams.add(stream)
        if not self._ticking:
            self._ticking = True
            asyncio.get_running_loop().call_later(_TICK_S, self._tick)

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for stream in [*self.streams]:
            stream.write_due(now)
        self._ticking = bool(self.streams)
        if self._ticking:
            loop.call_later(_TICK_S, self._tick)


class Connection(asyncio.Protocol):
    """One client's connection; handles one request after the other.

    Args:
        engine: Drives its streams.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._parser = httptools.HttpRequestParser(self)
        self._url, self._kept = b"", b""
        self._left = self._sent = self._rate = 0
        self._began = 0.0
        self._paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accept a client."""
        self._write: Callable[[bytes], None] = cast("asyncio.Transport", transport).write

    def connection_lost(self, error: Exception | None) -> None:
        """Stop the stream."""
        del error
        self._engine.streams.discard(self)
        self._left = 0

    def data_received(self, data: bytes) -> None:
        """Parse requests."""
        self._parser.feed_data(data)

    def pause_writing(self) -> None:
        """Pause the stream for a client that reads slowly."""
        self._paused = True

    def resume_writing(self) -> None:
        """Continue the stream."""
        self._paused = False
        if self._left and not self._rate:
            self._flood()

    def on_url(self, url: bytes) -> None:
        """Begin a request."""
        self._url, self._kept = url, b""

    def on_body(self, body: bytes) -> None:
        """Keep the beginning of the body."""
        if len(self._kept) < _KEPT:
            self._kept += body[:_KEPT]

    def on_message_complete(self) -> None:
        """Respond."""
        if found := _INSTRUCTION.search(self._kept):
            self._respond(found[1], int(found[2]), int(found[3]))
        elif self._url.startswith(b"/health"):
            self._write(_json(b'{"status":"ok"}'))
        elif self._url.startswith(b"/v1/models"):
            self._write(_json(b'{"object":"list","data":[{"id":"stub","object":"model"}]}'))
        else:
            self._write(_NOT_FOUND)

    def _respond(self, kind: bytes, first: int, second: int) -> None:
        if kind == b"answer" and second:
            asyncio.get_running_loop().call_later(second / 1000, self._write, _answer(first))
        elif kind == b"answer":
            self._write(_answer(first))
        elif kind == b"idle":
            self._write(_FIRST)
        else:
            self._stream(first, second)

    def _stream(self, chunks: int, rate: int) -> None:
        self._began, self._rate, self._left = asyncio.get_running_loop().time(), rate, chunks - 1
        self._sent = 1
        self._write(_FIRST)
        if rate and self._left:
            self._engine.begin(self)
        else:
            self._flood()

    def write_due(self, now: float) -> None:
        """Write the chunks that are due."""
        due = int((now - self._began) * self._rate) + 1 - self._sent
        if due <= 0 or self._paused:
            return
        self._write_chunks(due)
        if not self._left:
            self._engine.streams.discard(self)
            self._write(_LAST)

    def _flood(self) -> None:
        while self._left and not self._paused:
            self._write_chunks(_BLOCK)
        if not self._left:
            self._write(_LAST)

    def _write_chunks(self, most: int) -> None:
        count, at = min(most, _BLOCK, self._left), self._sent % _BLOCK
        self._sent += count
        self._left -= count
        self._write(_CHUNKS[at * _SIZE : (at + count) * _SIZE])


async def serve(port: int) -> None:
    """Serve until cancelled."""
    engine = Engine()
    listener = socket.create_server(("127.0.0.1", port), backlog=4096)
    server = await asyncio.get_running_loop().create_server(lambda: Connection(engine), sock=listener)
    async with server:
        await server.serve_forever()


def main() -> None:
    """Serve until a signal ends the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    uvloop.run(serve(parser.parse_args().port))


if __name__ == "__main__":
    main()
