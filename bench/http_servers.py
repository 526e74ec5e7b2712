"""HTTP servers under our gateway, judged by cases of the field and by speed. `make bench-http-servers`.

Each candidate serves the same application in front of the same stub, on uvloop with httptools where it can. uvicorn and
Granian are no dependencies of the service: `pip install uvicorn h11 granian` adds them to the comparison.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import uvloop

from bench.gateway_candidates import DIRECT, KEY, UPSTREAM_KEY, Candidate, Candidates, family, running
from bench.gateway_load import Load, Work
from bench.gateway_proxies import ANSWER_BYTES, CHUNKS, CHUNKS_PER_S, MANY, at, warm
from bench.gateway_server import ENGINE_KEY, MODEL, Upstream
from bench.gateway_stub import instruction
from bench.processes import free_port
from service import keys
from service.gateway.app import create_app
from service.gateway.clients import load_clients
from service.gateway.http_server.server import HttpServer
from service.gateway.local_scheduler import LocalScheduler
from service.gateway.metrics import Metrics
from service.gateway.router import ModelRouter
from service.registry.models import Registry

UPSTREAM_PORT = "UPSTREAM_PORT"
SLOW_S = 35.0  # a head or a body that stalls must have its 408 by then
CANDIDATES = {"own": "", "uvicorn": "uvicorn", "uvicorn h11": "h11", "Granian": "granian"}  # name -> package


def application() -> Any:
    """Return our gateway in front of the stub; Granian imports this function."""
    registry = Registry.load()
    spec = registry.resolve(MODEL).spec
    scheduler = LocalScheduler(lambda _: None, _never, free_memory=lambda: 0, needs_memory=lambda _: 0, idle_s=86_400)
    scheduler.pool(spec).attach(Upstream(), int(os.environ[UPSTREAM_PORT]), os.environ[ENGINE_KEY])
    clients = load_clients(os.environ, keys.digests(os.environ), registry, MODEL)
    return create_app(ModelRouter(registry, spec.key, scheduler.pool), clients, Metrics(), hold_s=5)


def _never(*_: object) -> Any:
    raise AssertionError("the only engine already runs")


def serve(name: str, port: int) -> None:
    """Serve with a candidate until a signal ends the process."""
    if name == "own":
        uvloop.run(_serve_own(port))
    elif name == "Granian":
        from granian import Granian  # noqa: PLC0415 - one candidate of several
        from granian.constants import Interfaces, Loops  # noqa: PLC0415

        options = {"interface": Interfaces.ASGI, "loop": Loops.uvloop, "factory": True, "log_access": False}
        Granian("bench.http_servers:application", port=port, workers=1, **options).serve()
    else:
        import uvicorn  # noqa: PLC0415 - one candidate of several

        http: Any = "h11" if name == "uvicorn h11" else "httptools"
        options = {"access_log": False, "log_config": None, "log_level": "critical", "timeout_keep_alive": 75}
        uvicorn.run(application(), port=port, http=http, loop="uvloop", backlog=4096, server_header=False, **options)


async def _serve_own(port: int) -> None:
    await HttpServer(application()).start([socket.create_server(("127.0.0.1", port), backlog=4096)])
    await asyncio.Event().wait()


def _ask(port: int, *pieces: bytes, wait_s: float = 3.0, pause_s: float = 0.05) -> bytes:
    """Send pieces and return what comes back until the end of the connection or of the time."""
    got = b""
    with socket.create_connection(("127.0.0.1", port), timeout=wait_s) as client, contextlib.suppress(OSError):
        for piece in pieces:
            client.sendall(piece)
            time.sleep(pause_s)
        while more := client.recv(65536):
            got += more
    return got


def _post(body: bytes, *headers: str, key: str = KEY, length: str | None = None) -> bytes:
    declared = f"Content-Length: {len(body) if length is None else length}"
    auth = [f"Authorization: Bearer {key}"] if key else []
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json", *auth, *headers]
    return "\r\n".join([*lines, *([declared] if length != "" else []), "", ""]).encode() + body


def _cases() -> dict[str, Callable[[int], bool]]:
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "%b"}]}' % instruction("answer", 1024).encode()
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA")
    chunked = b"%x\r\n%b\r\n0\r\nAuthorization: Bearer %b\r\n\r\n" % (len(body), body, KEY.encode())
    large, get = b" " * (40 << 20), b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"

    def status(code: int, *pieces: bytes, wait_s: float = 3.0) -> Callable[[int], bool]:
        return lambda port: b" %d " % code in _ask(port, *pieces, wait_s=wait_s)[:13]

    def keeps(port: int) -> bool:
        return _ask(port, get, get, pause_s=7.0).count(b" 200 ") == 2

    def bounded(port: int) -> bool:
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(50)]
        time.sleep(SLOW_S)
        for client in silent:
            client.setblocking(False)
        closed = 0
        for client in silent:
            with contextlib.suppress(BlockingIOError):
                closed += not client.recv(1)
            client.close()
        return closed == len(silent)

    return {
        "A1 upgrade offer on a POST: 200": status(200, _post(body, *offer)),
        "A12 413 while the client writes": status(413, _post(large)),
        "A14 Date once": lambda port: _ask(port, get).lower().count(b"\r\ndate:") == 1,
        "B2 idle for 7 s, then 200": keeps,
        "B3 head that stalls: 408": status(408, b"GET / HTTP/1.1\r\n", wait_s=SLOW_S),
        "B3 body that stalls: 408": status(408, _post(b"", length="100"), wait_s=SLOW_S),
        "trailer is no header: 401": status(401, _post(chunked, "Transfer-Encoding: chunked", key="", length="")),
        "Content-Length of 5,000 zeros: 400": status(400, _post(b"", length="0" * 5000 + "9")),
        "head of 200 KiB: 431": status(431, b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 200_000),
        "two Host headers: 400": status(400, b"GET /health HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n"),
        "silent connections are closed": bounded,
    }


def judge(name: str, port: int) -> None:
    """Print which cases hold."""
    for case, holds in _cases().items():
        print(f"{name:<12} {case:<38} {'holds' if holds(port) else 'FAILS'}", flush=True)


def compare(candidates: list[Candidate], load: Load, rounds: int) -> None:
    """Print medians of the rounds, in which the candidates take turns.

    Other work on the machine changes rates and times; of the processor time of a request it changes little.
    """
    answer = Work(0, "", "", instruction("answer", ANSWER_BYTES), seconds=2.0, warm_s=0.3)
    stream = replace(answer, message=instruction("stream", CHUNKS, CHUNKS_PER_S), stream=True, clients=MANY)
    kinds = {"c=1 answer": answer, f"c={MANY} answer": replace(answer, clients=MANY), f"c={MANY} stream": stream}
    found: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for number in range(rounds):
        turn = number % len(candidates)
        for candidate in candidates[turn:] + candidates[:turn]:
            for kind, work in kinds.items():
                before = _processor_s(candidate)
                done = load.run(at(candidate, work))
                used_s = (_processor_s(candidate) - before) * work.seconds / (work.seconds + work.warm_s)
                speed, count = (done.chunks_per_s, done.chunks) if work.stream else (done.requests_per_s, done.requests)
                figures = (speed, done.p50_ms, done.p99_ms, used_s / max(1, count) * 1e6)
                found.setdefault((candidate.name, kind), []).append(figures)
    for (name, kind), values in found.items():
        speed, p50, p99, used = (statistics.median(column) for column in zip(*values, strict=True))
        line = f"{speed:>8.0f}/s  first byte {p50:6.2f} ms, p99 {p99:6.2f} ms  processor {used:6.1f} us each"
        print(f"{name:<12} {kind:<12} {line}", flush=True)


def _processor_s(candidate: Candidate) -> float:
    if not candidate.pid:
        return 0.0
    times = [member.cpu_times() for member in family(candidate.pid)]
    return sum(time.user + time.system for time in times)


def main() -> None:
    """Serve, or judge and compare all candidates that are installed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", nargs=2, metavar=("NAME", "PORT"))
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-cases", action="store_true")
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve[0], int(arguments.serve[1]))
        return
    with (
        TemporaryDirectory() as directory,
        contextlib.ExitStack() as stack,
        Candidates(Path(directory)) as stub,
        Load.started() as load,
    ):
        candidates = [stub.start(DIRECT)]
        environment = {"API_KEY": KEY, ENGINE_KEY: UPSTREAM_KEY, UPSTREAM_PORT: str(stub.upstream)}
        for name in arguments.only:
            if (package := CANDIDATES[name]) and not find_spec(package):
                print(f"{name}: not installed; pip install {package}")
                continue
            port = free_port()
            command = [sys.executable, "-m", "bench.http_servers", "--serve", name, str(port)]
            log = Path(directory) / f"{name}.log"
            pid = stack.enter_context(running(name, command, log, f"http://127.0.0.1:{port}/health", **environment))
            candidates.append(Candidate(name, port, KEY, MODEL, pid))
            warm(candidates[-1], load)
            if not arguments.no_cases:
                judge(name, port)
        compare(candidates, load, arguments.rounds)


if __name__ == "__main__":
    main()
