"""Batches against the same load sent directly, and what an interactive client waits meanwhile; for a quiet machine.

`python -m bench.batch` serves the tiny model, sends lines as a batch and as saturating load, and measures the time to
the first token of a client that asks now and then, with and without a batch.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import openai

from bench.batch_kills import KEY, UpSite, input_lines
from bench.report import Report

_MAX_TOKENS = 64
_AT_ONCE = (8, 16, 32, 64)  # of the load: the best of them saturates
_PAUSE_S = 0.1


async def measure(lines: int, interactive_s: float) -> Report:
    """Measure on a service of its own."""
    report = Report("batch")
    with TemporaryDirectory(prefix="bench-batch-") as directory:
        async with (
            UpSite(Path(directory)) as site,
            openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key=KEY, max_retries=0, timeout=600) as client,
        ):
            await _direct(client, lines // 4, 16)  # warm
            direct = {at_once: await _direct(client, lines, at_once) for at_once in _AT_ONCE}
            best = max(direct, key=direct.__getitem__)
            rate = await _batch(client, lines)
            report.add(f"direct load, {best} at a time", direct[best], None, "/s")
            report.add(f"batch of {lines} lines", rate, None, "/s")
            report.add("direct load / batch", direct[best] / rate, 1 / 0.95)
            alone = await _first_tokens(client, interactive_s, lambda: False)
            beside = asyncio.create_task(_batch(client, 50 * lines))
            await asyncio.sleep(3)  # the search for the concurrency has ended
            during = await _first_tokens(client, interactive_s, beside.done)
            beside.cancel()
            with suppress(asyncio.CancelledError):
                await beside
    p95 = [statistics.quantiles(report.samples.setdefault(name, values), n=20)[-1]
           for name, values in (("alone", alone), ("during", during))]  # fmt: skip
    report.add("time to the first token alone, p95", 1000 * p95[0], None, "ms")
    report.add("time to the first token during a batch, p95", 1000 * p95[1], None, "ms")
    report.add("during a batch / alone", p95[1] / p95[0], 2)
    return report


async def _direct(client: openai.AsyncOpenAI, lines: int, at_once: int) -> float:
    """Return how many requests a second are answered with so many at a time."""
    bodies = [json.loads(line)["body"] for line in input_lines(lines, _MAX_TOKENS).splitlines()]
    waiting = iter(bodies)

    async def ask() -> None:
        for body in waiting:
            extra = {"ignore_eos": body.pop("ignore_eos")}
            await client.completions.create(**body, extra_body=extra)

    began = time.monotonic()
    await asyncio.gather(*(ask() for _ in range(at_once)))
    return lines / (time.monotonic() - began)


async def _batch(client: openai.AsyncOpenAI, lines: int) -> float:
    """Return how many lines a second a batch answers; cancelled, it cancels the batch."""
    file = await client.files.create(file=("in.jsonl", input_lines(lines, _MAX_TOKENS)), purpose="batch")
    began = time.monotonic()
    batch = await client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    try:
        while batch.status != "completed":
            await asyncio.sleep(0.05)
            batch = await client.batches.retrieve(batch.id)
    except asyncio.CancelledError:
        await client.batches.cancel(batch.id)
        raise
    return lines / (time.monotonic() - began)


async def _first_tokens(client: openai.AsyncOpenAI, seconds: float, has_ended: Callable[[], bool]) -> list[float]:
    """Return the seconds to the first token of requests with pauses in between."""
    found: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end and not has_ended():
        began = time.monotonic()
        messages: Any = [{"role": "user", "content": "What is the capital of France?"}]
        stream = await client.chat.completions.create(model="tiny", messages=messages, stream=True)
        async for _ in stream:
            found.append(time.monotonic() - began)
            break
        await stream.close()
        await asyncio.sleep(_PAUSE_S)
    return found


def main() -> int:
    """Measure, print the figures and save them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=1000)
    parser.add_argument("--interactive-s", type=float, default=20)
    arguments = parser.parse_args()
    return asyncio.run(measure(arguments.lines, arguments.interactive_s)).finish()


if __name__ == "__main__":
    sys.exit(main())
