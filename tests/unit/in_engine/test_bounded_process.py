"""Work in a process of bounded time and memory: what a job may do to it, and what is left afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil
import pytest
from vllm_service.bounded_fork import Bounds
from vllm_service.bounded_process import BoundedProcess, ProcessLostError

IN_ENGINE = Path(__file__).parents[3] / "service" / "in_engine"
BOUNDS = Bounds(cpu_s=0.3, memory_bytes=64 * 1024**2, wall_s=20)


def descriptors() -> list[str]:
    """Return which sockets and pipes this process has, besides the standard ones; each is told by its inode."""
    found = []
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the directory itself is closed again
            found.append(str(file.readlink()) if int(file.name) > 2 else "")
    return [link for link in found if link.startswith(("socket:", "pipe:"))]


class Work:
    """Jobs by name; `prepared` counts those that the process itself made ready."""

    prepared = 0

    def prepare(self, job: dict[str, Any]) -> None:
        """Count it."""
        self.prepared += 1
        if job["do"] == "end the process":
            os._exit(3)

    def do(self, job: dict[str, Any]) -> dict[str, Any]:
        """Do what the job says."""
        held: list[bytes] = []
        match job["do"]:
            case "echo":
                return {"echo": job["text"], "prepared": self.prepared, "pid": os.getpid()}
            case "spin":
                while True:
                    pass
            case "sleep":
                time.sleep(600)
            case "allocate":
                while True:
                    held.append(bytes(1 << 20))
            case "crash":
                os.abort()
            case "exit":
                os._exit(7)
            case "descriptors":
                return {"descriptors": descriptors()}
        return {}


def run(test: Callable[[BoundedProcess], Coroutine[Any, Any, None]], bounds: Bounds = BOUNDS, **kwargs: Any) -> None:
    """Run a test with a process, of which nothing is left afterwards."""

    async def run_and_close() -> None:
        process = BoundedProcess(Work(), bounds, **kwargs)
        try:
            await test(process)
        finally:
            pid = process.pid
            await process.close()
        assert pid is None or not psutil.pid_exists(pid)

    asyncio.run(run_and_close())


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another process does."""
    while not condition():  # noqa: ASYNC110 - it sets no event
        await asyncio.sleep(0.01)


def test_process_starts_with_the_first_job_and_serves_all() -> None:
    """What one job needs is there for the next, and each job is done in a fork of its own."""

    async def test(process: BoundedProcess) -> None:
        assert process.pid is None
        first = await process.run({"do": "echo", "text": "é" * 100_000})
        pid = process.pid
        second = await process.run({"do": "echo", "text": ""})

        assert first["echo"] == "é" * 100_000
        assert (first["prepared"], second["prepared"]) == (1, 2)
        assert process.pid == pid
        assert len({first["pid"], second["pid"], pid, os.getpid()}) == 4

    run(test)


@pytest.mark.parametrize(
    ("do", "exceeded"),
    [("spin", "cpu"), ("crash", "SIGABRT"), ("exit", "exit code 7"), ("allocate", "exit code 1")],
)
def test_job_beyond_its_bounds_ends_alone(do: str, exceeded: str) -> None:
    """The process and its next job are unharmed."""

    async def test(process: BoundedProcess) -> None:
        await process.run({"do": "echo", "text": ""})
        pid = process.pid
        assert (await process.run({"do": do}))["exceeded"] == exceeded
        assert (await process.run({"do": "echo", "text": "next"}))["echo"] == "next"
        assert process.pid == pid

    run(test)


def test_job_that_waits_for_something_ends_in_time() -> None:
    """It takes no processor time."""

    async def test(process: BoundedProcess) -> None:
        assert (await process.run({"do": "sleep"}))["exceeded"] == "wall"

    run(test, Bounds(cpu_s=5, memory_bytes=1 << 26, wall_s=0.1))


def test_job_that_nobody_waits_for_is_killed() -> None:
    """And the next one is answered at once."""

    async def test(process: BoundedProcess) -> None:
        await process.run({"do": "echo", "text": ""})
        itself = psutil.Process(process.pid)
        job = asyncio.create_task(process.run({"do": "sleep"}))
        await until(lambda: bool(itself.children()))
        (fork,) = itself.children()
        job.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await job
        assert (await process.run({"do": "echo", "text": "next"}))["echo"] == "next"
        assert not fork.is_running()
        assert psutil.Process(process.pid) == itself

    run(test)


def test_job_cancelled_before_it_began_is_left_out() -> None:
    """Jobs and cancellations may arrive together."""

    async def test(process: BoundedProcess) -> None:
        await process.run({"do": "echo", "text": ""})
        for _ in range(20):
            job = asyncio.create_task(process.run({"do": "spin"}))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            job.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await job
        begun = time.monotonic()
        assert (await process.run({"do": "echo", "text": "next"}))["echo"] == "next"
        assert time.monotonic() - begun < 20 * BOUNDS.cpu_s

    run(test)


def test_process_whose_first_job_is_cancelled_while_it_starts_is_not_left() -> None:
    """In whichever round of the event loop."""

    async def test(process: BoundedProcess) -> None:
        others = psutil.Process().children()
        for rounds in range(8):
            job = asyncio.create_task(process.run({"do": "echo", "text": ""}))
            for _ in range(rounds):
                await asyncio.sleep(0)
            job.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await job
            await process.close()
            assert psutil.Process().children() == others, rounds

    run(test)


def test_process_that_is_lost_is_replaced() -> None:
    """Its job is answered with an error, for it may be without fault."""

    async def test(process: BoundedProcess) -> None:
        with pytest.raises(ProcessLostError):
            await process.run({"do": "end the process"})
        assert process.pid is None
        assert (await process.run({"do": "echo", "text": "next"}))["echo"] == "next"

    run(test)


def test_process_that_is_killed_without_a_job_is_reaped_and_fails_no_job() -> None:
    """The next job gets another process, as after a while without one."""

    async def test(process: BoundedProcess) -> None:
        await process.run({"do": "echo", "text": ""})
        killed = process.pid
        assert killed
        os.kill(killed, signal.SIGKILL)
        async with asyncio.timeout(5):
            await until(lambda: not psutil.pid_exists(killed))
        assert (await process.run({"do": "echo", "text": "again"}))["echo"] == "again"

    run(test)


def test_process_without_a_job_ends_after_a_while() -> None:
    """It holds memory; the next job starts another."""

    async def test(process: BoundedProcess) -> None:
        await process.run({"do": "echo", "text": ""})
        await until(lambda: process.pid is None)
        assert (await process.run({"do": "echo", "text": "next"}))["prepared"] == 1

    run(test, idle_s=0.05)


def test_process_keeps_no_descriptor_of_its_parent() -> None:
    """A client's connection that the parent closes is closed, and a port that it leaves is free."""

    async def test(process: BoundedProcess) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            ours = descriptors()
            found = (await process.run({"do": "descriptors"}))["descriptors"]
            address = listening.getsockname()
        assert len(ours) >= 2
        assert not {*ours} & {*found}
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, 1)

    run(test)


@pytest.mark.parametrize("sleep_s", [0, 600], ids=["idle", "at work"])
def test_process_and_job_end_with_their_parent(sleep_s: int) -> None:
    """Killed, not asked: it has no time to end anything."""
    program = f"""
import asyncio, os, time
from vllm_service.bounded_fork import Bounds
from vllm_service.bounded_process import BoundedProcess
class Work:
    def prepare(self, job):
        pass
    def do(self, job):
        time.sleep(job["sleep_s"])
        return {{}}
async def run():
    process = BoundedProcess(Work(), Bounds(5, 1 << 26, 60))
    await process.run({{"sleep_s": 0}})
    print("ready", flush=True)
    await process.run({{"sleep_s": {sleep_s}}})
    await asyncio.sleep(600)
asyncio.run(run())
"""
    environment = {**os.environ, "PYTHONPATH": str(IN_ENGINE)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) as parent:
        try:
            assert parent.stdout is not None
            assert parent.stdout.readline() == b"ready\n"
            count, deadline = 1 + bool(sleep_s), time.monotonic() + 10
            family: list[psutil.Process] = []
            while len(family) != count and time.monotonic() < deadline:
                family = psutil.Process(parent.pid).children(recursive=True)
        finally:
            parent.send_signal(signal.SIGKILL)
    gone, alive = psutil.wait_procs(family, timeout=10)

    assert len(gone) == count
    assert not alive
