"""The kinds of faults: what each does to the service, and what its clients may then be told.

Whatever a kind does not name in `tolerates` is a violation; models that it does not concern answer as if nothing were.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
import signal
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import aiohttp
import psutil

from bench.chaos.connections import cut, leave
from bench.chaos.load import CLOSED, CUT, REFUSED, ask
from bench.chaos.requests import draw
from bench.chaos.site import HANG_S, MODELS, Engine, Site
from tests.fakes.hub import Fault

Inject = Callable[[Site, random.Random], Awaitable[None]]
# The last of each is Anthropic's name of the others.
_LOST = frozenset({"engine_lost", "api_error"})
_FAILED = frozenset({"model_failed", "overloaded_error"})
_FULL = frozenset({"too_many_connections", "overloaded_error"})
_UNCOMPILED = frozenset({"engine_overloaded", "overloaded_error"})
_ENDING = frozenset({"shutting_down", "overloaded_error", REFUSED, CLOSED})
_GONE = _ENDING | _LOST | {CUT}
_HUB_S = 90.0  # until a request is told that the hub fails: it is asked again for a while
_DAY_S = 86_400
_FAILURE_KEPT_S = 5.0  # a pool repeats the failure of its wake for so long


@dataclass(frozen=True)
class Kind:
    """One kind of fault.

    Attributes:
        tolerates: What clients may be told, or may happen to them, while it lasts.
        models: Those that it concerns.
        replaces: Those whose engine is another one afterwards.
        ends: The exit code with which the command ends; None: it goes on.
        weight: How many of a deck are of this kind; 0: it takes so long that only long runs have it, once in a deck.
        extra_s: Seconds beside a boot that the service may need until it is ready again.
    """

    name: str
    inject: Inject
    tolerates: frozenset[str] = frozenset()
    models: tuple[str, ...] = ("tiny", "twin")
    replaces: tuple[str, ...] = ()
    ends: int | None = None
    weight: int = 1
    extra_s: float = 0.0


def _engine(site: Site, model: str) -> Engine:
    engine = site.engine(model)
    assert engine, f"{model} has no engine"  # noqa: S101 - it was ready when the fault began
    return engine


def _send(processes: Iterable[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


async def _kill_core(site: Site, _: random.Random) -> None:
    _send([_engine(site, "twin").core], signal.SIGKILL)


async def _kill_api_process(site: Site, _: random.Random) -> None:
    _send([_engine(site, "twin").leader], signal.SIGKILL)


async def _kill_during_boot(site: Site, rng: random.Random) -> None:
    """Kill an engine, and its successor at a random moment of its boot."""
    first = _engine(site, "twin").leader
    _send([first], signal.SIGKILL)
    deadline = time.monotonic() + 10
    while not (second := [leader for leader in site.leaders("twin") if leader.pid != first.pid]):
        assert time.monotonic() < deadline, "no other engine was started"  # noqa: S101
        await asyncio.sleep(0.02)
    await asyncio.sleep(rng.uniform(0, site.boot_s * 0.7))
    _send(second, signal.SIGKILL)


async def _hang(site: Site, _: random.Random) -> None:
    """Stop an engine core for good: it is missed by its heartbeat."""
    core = _engine(site, "twin").core
    _send([core], signal.SIGSTOP)
    deadline = time.monotonic() + HANG_S + 10
    while core.is_running() and core.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the hung engine was not killed"  # noqa: S101
        await asyncio.sleep(0.05)


async def _run_out_of_memory(site: Site, _: random.Random) -> None:
    await asyncio.to_thread(site.memory.kill_by_kernel, _engine(site, "twin").core)
    if site.memory.prefix:
        await asyncio.to_thread(site.service.wait_said, "because memory ran out")


async def _kill_default_engine(site: Site, rng: random.Random) -> None:
    engine = _engine(site, "tiny")
    _send([rng.choice([engine.leader, engine.core])], signal.SIGKILL)


async def _kill_service(site: Site, _: random.Random) -> None:
    site.service.signal(signal.SIGKILL)


async def _terminate(site: Site, rng: random.Random) -> None:
    site.service.signal(rng.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP)))


async def _interrupt_twice(site: Site, rng: random.Random) -> None:
    site.service.signal(signal.SIGINT)
    await asyncio.sleep(rng.uniform(0.05, 0.3))
    with contextlib.suppress(ProcessLookupError):
        site.service.signal(signal.SIGINT)


async def _signal_engines(site: Site, rng: random.Random) -> None:
    """Send engines what a supervisor sends to every process of a service: they heed the command only."""
    for _ in range(rng.randint(1, 20)):
        engine = _engine(site, rng.choice(MODELS))
        _send([rng.choice([engine.leader, engine.core])], rng.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP)))
        await asyncio.sleep(rng.uniform(0, 0.05))


async def _kill_compiler(site: Site, rng: random.Random) -> None:
    """Kill what compiles structured outputs beside an engine, or its job, a few times."""
    model = rng.choice(MODELS)
    for _ in range(3):
        others = _engine(site, model).others
        _send(rng.sample(others, min(1, len(others))), signal.SIGKILL)
        await asyncio.sleep(rng.uniform(0, 0.4))


async def _pause_one(site: Site, rng: random.Random) -> None:
    engine = _engine(site, rng.choice(MODELS))
    await _pause([rng.choice([engine.leader, engine.core, *engine.others, site.process])], rng.uniform(0.1, 2))


async def _pause_all(site: Site, rng: random.Random) -> None:
    await _pause([site.process, *site.process.children(recursive=True)], rng.uniform(0.1, 2))


async def _pause(processes: list[psutil.Process], seconds: float) -> None:
    _send(processes, signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        _send(processes, signal.SIGCONT)


async def _fill_disk(site: Site, rng: random.Random) -> None:
    with _full_disk(site):
        await asyncio.sleep(rng.uniform(0.3, 1.5))


async def _kill_core_on_full_disk(site: Site, rng: random.Random) -> None:
    """The next engine cannot make its directory until there is room again."""
    with _full_disk(site):
        await _kill_core(site, rng)
        await asyncio.sleep(rng.uniform(1, 3))


@contextmanager
def _full_disk(site: Site) -> Iterator[None]:
    """Fill the service's disk; where it has none of its own, let none of its processes write to files."""
    if site.has_own_disk:
        filler = site.disk / "filler"
        try:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 20))
            with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
                while True:
                    file.write(b".")
            yield
        finally:
            filler.unlink()
    else:
        with _limited([site.process, *site.process.children(recursive=True)], resource.RLIMIT_FSIZE, lambda _: 0):
            yield


@contextmanager
def _limited(processes: list[psutil.Process], kind: int, allowed: Callable[[psutil.Process], int]) -> Iterator[None]:
    """Lower a limit of these processes within a context."""
    before = [(process, process.rlimit(kind)) for process in processes]
    try:
        for process, (_, hard) in before:
            process.rlimit(kind, (allowed(process), hard))
        yield
    finally:
        for process, limits in before:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.rlimit(kind, limits)


async def _exhaust_descriptors_of_service(site: Site, rng: random.Random) -> None:
    with _limited([site.process], resource.RLIMIT_NOFILE, lambda process: rng.randint(16, process.num_fds() + 3)):
        await asyncio.sleep(rng.uniform(0.5, 1.5))


async def _exhaust_descriptors_of_engine(site: Site, rng: random.Random) -> None:
    leader = _engine(site, rng.choice(MODELS)).leader
    with _limited([leader], resource.RLIMIT_NOFILE, lambda process: rng.randint(16, process.num_fds() + 3)):
        await asyncio.sleep(rng.uniform(0.5, 1.5))


async def _lose_hub(site: Site, rng: random.Random) -> None:
    """A model whose weights are not here is asked for while its hub fails; it is an error in bounded time."""
    lost = rng.choice((Fault(".*", times=-1, status=503), Fault("resolve", times=-1, cut_after=rng.randint(0, 1000))))
    site.hub.faults = [lost]
    try:
        async with aiohttp.ClientSession() as http:
            outcome = await ask(http, site.url, draw(rng, ["distant"]), _HUB_S)
    finally:
        site.hub.faults = []
    assert outcome.code in _FAILED, f"without its hub: {outcome}"  # noqa: S101


async def _move_clock(site: Site, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 4)):
        site.move_clock(rng.choice((-1, 1)) * rng.choice((1, 60, 3600, _DAY_S, 30 * _DAY_S, 3650 * _DAY_S)))
        await asyncio.sleep(rng.uniform(0.1, 0.5))


async def _let_clients_leave(site: Site, rng: random.Random) -> None:
    await asyncio.gather(*(leave(site.url, rng) for _ in range(rng.randint(2, 12))))


async def _cut_clients(site: Site, rng: random.Random) -> None:
    cut(site.process, lambda each: each.laddr.port == site.port, rng)


async def _cut_engines(site: Site, rng: random.Random) -> None:
    ports = site.ports()
    for _ in range(rng.randint(1, 3)):
        cut(site.process, lambda each: bool(each.raddr) and each.raddr.port in ports, rng)
        await asyncio.sleep(rng.uniform(0, 0.3))


KINDS = (
    Kind("the core of twin is killed", _kill_core, _LOST, ("twin",), replaces=("twin",)),
    Kind("the API process of twin is killed", _kill_api_process, _LOST | {CUT}, ("twin",), replaces=("twin",)),
    Kind("twin and its successor are killed", _kill_during_boot, _LOST | _FAILED | {CUT}, ("twin",), ("twin",),
         weight=0, extra_s=2 * _FAILURE_KEPT_S),
    Kind("memory runs out", _run_out_of_memory, _LOST, ("twin",), replaces=("twin",)),
    Kind("twin hangs", _hang, _LOST, ("twin",), replaces=("twin",), weight=0),
    Kind("the engine of tiny is killed", _kill_default_engine, _GONE, ends=1, weight=0),
    Kind("the service is killed", _kill_service, _GONE, ends=-signal.SIGKILL),
    Kind("the service is told to end", _terminate, _ENDING, ends=0, weight=0),
    Kind("the service is interrupted twice", _interrupt_twice, _GONE, ends=0, weight=0),
    Kind("engines get signals", _signal_engines, weight=3),
    Kind("the compiler of structured outputs is killed", _kill_compiler, _UNCOMPILED, weight=3),
    Kind("a process is paused", _pause_one, weight=4),
    Kind("all processes are paused", _pause_all, weight=2),
    Kind("the disk is full", _fill_disk, weight=3),
    Kind("the core of twin is killed on a full disk", _kill_core_on_full_disk, _LOST | _FAILED, ("twin",), ("twin",),
         weight=0, extra_s=2 * _FAILURE_KEPT_S),
    Kind("the service has no descriptors left", _exhaust_descriptors_of_service, _FULL | {CLOSED},
         weight=3),
    Kind("an engine has no descriptors left", _exhaust_descriptors_of_engine, _LOST | _UNCOMPILED, weight=3),
    Kind("the hub fails", _lose_hub, weight=0),
    Kind("the clock jumps", _move_clock, weight=4),
    Kind("clients leave", _let_clients_leave, weight=4),
    Kind("connections of clients are cut", _cut_clients, frozenset({CLOSED, CUT}), weight=4),
    Kind("connections to engines are cut", _cut_engines, _LOST | {CUT}, weight=3),
)  # fmt: skip
