"""A batch whose gateway and engine are killed at random moments: every line must have one answer.

`run` is what `make soak` and the test share; what serves, and how its parts are killed, is a `Site`.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import openai

from tests.engine.running import Service, free_port

Kind = Literal["gateway", "engine"]
KEY = "sk-batch-kills"
_POLL_S = 0.01
_FINAL = {"completed", "failed", "expired", "cancelled"}


class Site(Protocol):
    """A gateway and its engine.

    Attributes:
        url: Where the gateway listens.
        state: Its state directory.
    """

    url: str
    state: Path

    async def kill(self, kind: Kind) -> None:
        """Kill a part, and have it back."""


@dataclass(frozen=True)
class Outcome:
    """What became of a batch.

    Attributes:
        status: Of the batch.
        answered: Lines with an answer.
        twice: Lines with more than one record.
        lost: Lines with none.
        failed: Records of the error file.
        kills: What was killed, in order.
    """

    status: str
    answered: int
    twice: int
    lost: int
    failed: int
    kills: Sequence[Kind]

    @property
    def good(self) -> bool:
        """Whether every line has one answer."""
        return self.status == "completed" and not (self.twice or self.lost or self.failed)


def input_lines(count: int, max_tokens: int = 8) -> bytes:
    """Return an input of short requests to the tiny model."""
    return b"".join(
        json.dumps(
            {
                "custom_id": f"line {number}",
                "method": "POST",
                "url": "/v1/completions",
                "body": {"model": "tiny", "prompt": f"Line {number}", "max_tokens": max_tokens, "ignore_eos": True},
            }
        ).encode()
        + b"\n"
        for number in range(count)
    )


async def run(site: Site, count: int, kinds: Sequence[Kind], seed: int, timeout_s: float) -> Outcome:
    """Run a batch of so many lines, and kill these parts once random numbers of lines have an answer."""
    chance = random.Random(seed)  # noqa: S311 - no secret
    moments = sorted(chance.sample(range(1, count * 9 // 10), len(kinds)))
    async with (
        asyncio.timeout(timeout_s),
        openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key=KEY, max_retries=10, timeout=30) as client,
    ):
        file = await client.files.create(file=("in.jsonl", input_lines(count)), purpose="batch")
        batch = await client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        for moment, kind in zip(moments, kinds, strict=True):
            while _records(site.state, file.id) < moment:  # noqa: ASYNC110 - a file
                await asyncio.sleep(_POLL_S)
            await site.kill(kind)
        while (batch := await _retrieved(client, batch.id)).status not in _FINAL:  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0.1)
        names = [record["custom_id"] for record in await _content(client, batch.output_file_id)]
        failed = await _content(client, batch.error_file_id)
    times = Counter([*names, *(record["custom_id"] for record in failed)])
    return Outcome(
        status=batch.status,
        answered=len(names),
        twice=sum(number > 1 for number in times.values()),
        lost=sum(f"line {number}" not in times for number in range(count)),
        failed=len(failed),
        kills=kinds,
    )


async def _retrieved(client: openai.AsyncOpenAI, name: str) -> openai.types.Batch:
    while True:
        with suppress(openai.APIConnectionError):
            return await client.batches.retrieve(name)


async def _content(client: openai.AsyncOpenAI, name: str | None) -> list[dict[str, str]]:
    if name is None:
        return []
    return [json.loads(line) for line in (await client.files.content(name)).text.splitlines()]


def _records(state: Path, uploaded: str) -> int:
    """Return how many records the files of answers have."""
    found = state.glob("vllm-service/batches/*/files/*/content")
    return sum(file.read_bytes().count(b"\n") for file in found if file.parent.name != uploaded)


class RelayedSite:
    """A gateway in front of an engine that already runs; the engine's death is that of all connections to it.

    Args:
        directory: Where the gateway keeps its state.
        engine: The engine's port.
        engine_key: The engine's key.
    """

    def __init__(self, directory: Path, engine: int, engine_key: str) -> None:
        self.state, self._engine, self._engine_key = directory, engine, engine_key
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._writers: set[asyncio.StreamWriter] = set()
        self._gateway: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> RelayedSite:
        """Start the relay and the gateway."""
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        await self._start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """End both."""
        await self._kill_gateway()
        self._server.close()
        self._abort()

    async def kill(self, kind: Kind) -> None:
        """Kill the gateway with SIGKILL and start it again, or break off every connection to the engine."""
        if kind == "engine":
            self._abort()
            return
        await self._kill_gateway()
        await self._start()

    def _abort(self) -> None:
        for writer in [*self._writers]:
            writer.transport.abort()

    async def _kill_gateway(self) -> None:
        assert self._gateway  # noqa: S101 - it was started
        with suppress(ProcessLookupError):
            self._gateway.kill()
        await self._gateway.wait()

    async def _start(self) -> None:
        relay = self._server.sockets[0].getsockname()[1]
        keys = {"API_KEYS": f"batch={KEY}", "ENGINE_KEY": self._engine_key, "XDG_STATE_HOME": str(self.state)}
        command = [sys.executable, "-m", "bench.gateway_server", "port", str(self._port), str(relay)]
        self._gateway = await asyncio.create_subprocess_exec(*command, env={**os.environ, **keys})
        while True:
            with suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self._port)
                writer.close()
                return
            await asyncio.sleep(_POLL_S)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", self._engine)
        except OSError:
            writer.close()
            return
        both = {writer, upstream}
        self._writers |= both
        try:
            await asyncio.gather(_copy(reader, upstream), _copy(upstream_reader, writer))
        finally:
            self._writers -= both
            for each in both:
                each.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


class UpSite:
    """`vllm-service up tiny`, started again after every kill, as a supervisor does.

    Args:
        directory: Where it keeps its state.
    """

    def __init__(self, directory: Path) -> None:
        self.state, self._port = directory, free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._service: Service | None = None
        self._starts = 0

    async def __aenter__(self) -> UpSite:
        """Start it."""
        await asyncio.to_thread(self._start)
        return self

    async def __aexit__(self, *_: object) -> None:
        """End it."""
        if self._service:
            await asyncio.to_thread(self._service.__exit__)

    async def kill(self, kind: Kind) -> None:
        """Kill the command or its engine with SIGKILL; whatever ends with it is started again."""
        service = self._service
        assert service  # noqa: S101 - it was started
        if kind == "engine":
            for process in service.engine():
                with suppress(Exception):  # it has ended
                    process.kill()
        else:
            os.kill(service.pid, 9)
        await asyncio.to_thread(self._start_again)

    def _start_again(self) -> None:
        assert self._service  # noqa: S101 - it was started
        self._service.wait_ended(60)
        self._service.__exit__()
        self._start()

    def _start(self) -> None:
        self._starts += 1
        environment = {"API_KEYS": f"batch={KEY}"}
        name = f"service-{self._starts}"
        self._service = Service(self.state, "tiny", port=self._port, name=name, **environment).__enter__()
        self._service.wait_ready()
