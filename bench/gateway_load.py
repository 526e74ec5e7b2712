"""Clients in a process of their own, each with one connection: it sends the next request when a response has ended.

`Load` starts the process and sends it one piece of work after the other through standard input. Time to first byte is
measured from the handing of the request to the socket to the first byte of the response body.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import uvloop

from bench.gateway_client import Client, Count, LoadError

_PROMPT = "You are a careful assistant who answers in full sentences and says so when something is not known. " * 6
_SETTLE_S = 60.0  # for requests in flight at the end
_AT_ONCE = 50  # connections opened together


@dataclass(frozen=True)
class Work:
    """What the clients do.

    Attributes:
        port: Of the server, on loopback.
        key: Sent as a bearer token.
        model: Name of the model in the body.
        message: The last of the chat's messages.
        stream: Whether the response is a stream.
        clients: Number of connections.
        warm_s: Seconds before the counting begins.
        seconds: Seconds of counting; or
        requests: number of requests, which all count.
        image_bytes: Size of an image in the body.
        extra: Further fields of the body.
    """

    port: int
    key: str
    model: str
    message: str
    stream: bool = False
    clients: int = 1
    warm_s: float = 0.0
    seconds: float = 0.0
    requests: int = 0
    image_bytes: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    def request(self) -> bytes:
        """Return the bytes of a request."""
        content: Any = self.message
        if self.image_bytes:
            url = {"url": "data:image/png;base64," + "A" * self.image_bytes}
            content = [{"type": "text", "text": self.message}, {"type": "image_url", "image_url": url}]
        messages = [{"role": "system", "content": _PROMPT}, {"role": "user", "content": content}]
        fields = {"model": self.model, "stream": self.stream, "messages": messages, **self.extra}
        body = json.dumps(fields).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1",
            f"Host: 127.0.0.1:{self.port}",
            f"Authorization: Bearer {self.key}",
            "User-Agent: bench",
            "Accept: */*",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        )
        return "\r\n".join((*head, "", "")).encode() + body


@dataclass(frozen=True)
class Done:
    """The result of a piece of work.

    Attributes:
        requests: Completed responses.
        chunks: Server-sent events.
        frames: Reads in which the bodies arrived.
        seconds: How long it took.
        p50_ms: Median of the times to first byte.
        p99_ms: 99th percentile of the times to first byte.
    """

    requests: int
    chunks: int
    frames: int
    seconds: float
    p50_ms: float
    p99_ms: float

    @property
    def requests_per_s(self) -> float:
        """Completed responses per second."""
        return self.requests / self.seconds

    @property
    def chunks_per_s(self) -> float:
        """Server-sent events per second."""
        return self.chunks / self.seconds


class Load:
    """The process that runs the clients."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @classmethod
    @contextmanager
    def started(cls) -> Iterator[Load]:
        """Start the process; kill it when the context exits."""
        command = [sys.executable, "-m", "bench.gateway_load"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen(command, **pipes, text=True, start_new_session=True)  # type: ignore[call-overload]
        try:
            yield cls(process)
        finally:
            process.kill()
            process.communicate()

    def run(self, work: Work) -> Done:
        """Do the work and return its result; blocks until it has ended.

        Raises:
            LoadError: A response was not 200, or a connection broke.
        """
        return Done(**self._command({"do": "run", "work": asdict(work)}))

    def hold(self, work: Work) -> None:
        """Open streams, wait for the first byte of each, and keep them open."""
        self._command({"do": "hold", "work": asdict(work)})

    def release(self) -> None:
        """Close the streams that `hold` opened."""
        self._command({"do": "release"})

    def _command(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout  # noqa: S101 - they are pipes
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline() or '{"error": "the load process ended"}')
        if "error" in answer:
            raise LoadError(answer["error"])
        return answer


async def _connect(work: Work, count: Count, more: Callable[[], bool]) -> list[Client]:
    request, loop, clients = work.request(), asyncio.get_running_loop(), []
    for begin in range(0, work.clients, _AT_ONCE):
        made = [
            loop.create_connection(lambda: Client(request, count, more), "127.0.0.1", work.port)
            for _ in range(begin, min(begin + _AT_ONCE, work.clients))
        ]
        clients += [client for _, client in await asyncio.gather(*made)]
    return clients


async def _run(work: Work) -> Done:
    count, left, open_ = Count(), work.requests - work.clients, True

    def more() -> bool:
        nonlocal left
        left -= 1
        return open_ and (left >= 0 if work.requests else True)

    clients = await _connect(work, count, more)
    everything = asyncio.ensure_future(_all([client.ended for client in clients]))
    done = None
    if work.seconds:
        await _or_failure(asyncio.sleep(work.warm_s), count)
        count.reset()
        await _or_failure(asyncio.sleep(work.seconds), count)
        done = (count.requests, count.chunks, count.frames, perf_counter() - count.began)
        open_ = False
    await _or_failure(asyncio.wait_for(everything, _SETTLE_S), count)
    if not done:
        done = (count.requests, count.chunks, count.frames, perf_counter() - count.began)
    times = sorted(count.first_bytes_s) or [0.0]
    p50, p99 = (times[min(len(times) - 1, int(len(times) * share))] * 1000 for share in (0.5, 0.99))
    return Done(*done, p50, p99)


async def _or_failure(work: Any, count: Count) -> None:
    task = asyncio.ensure_future(work)
    await asyncio.wait((task, count.failure), return_when=asyncio.FIRST_COMPLETED)
    if count.failure.done():
        task.cancel()
        count.failure.result()
    await task


async def _all(futures: list[asyncio.Future[None]]) -> None:
    await asyncio.wait(futures)


async def _hold(work: Work) -> list[Client]:
    count = Count()
    clients = await _connect(work, count, lambda: False)
    await _or_failure(asyncio.wait_for(_all([client.first for client in clients]), _SETTLE_S), count)
    return clients


async def _release(clients: list[Client]) -> None:
    for client in clients:
        client.close()
    await asyncio.sleep(0)


def main() -> None:
    """Execute the commands of standard input, one JSON object per line, until it is closed."""
    held: list[Client] = []
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for line in sys.stdin:
            command = json.loads(line)
            answer: dict[str, Any] = {}
            try:
                if command["do"] == "run":
                    answer = asdict(runner.run(_run(Work(**command["work"]))))
                elif command["do"] == "hold":
                    held += runner.run(_hold(Work(**command["work"])))
                else:
                    runner.run(_release(held))
                    held.clear()
            except (LoadError, OSError, TimeoutError) as error:
                answer = {"error": str(error) or type(error).__name__}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
