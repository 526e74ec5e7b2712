"""How long another API client waits for one token while one does its worst, and what the service takes meanwhile.

`vllm-service up tiny` with two keys and the real engine. Each of `hold_inputs` is sent with one key in a loop, on
several connections; with the other key, one-token requests follow each other. Then requests without a key: what each
costs, and whether it starts anything. The attackers are processes of their own on the same cores, so their work counts
against the service here.

Run by `make bench-hold`.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event

import psutil

from bench import processes
from bench.constraint_bombs import family, memory_of
from bench.hold_inputs import CHAT, COMPLETIONS, Input, inputs
from bench.report import Report

ALICE, BOB = "sk-alice-4f1c9a", "sk-bob-77e0d2"
ONE_TOKEN = json.dumps({"model": "llm", "prompt": "The capital of France", "max_tokens": 1}).encode()
P99_S, MEMORY_GIB, ANONYMOUS = 2.0, 1.0, 10_000
ANONYMOUS_MS = 0.2
_ANSWER_S = 120.0
_PAUSE_S = 0.02  # of the other client, between an answer and its next request
_MEMORY_S = 0.25


@dataclass
class Observed:
    """What was seen during one input.

    Attributes:
        waits_s: Of the other client, one a request.
        failed: Answers to the other client that were no 200.
        memory: The service's, again and again, in bytes.
    """

    waits_s: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    @property
    def p99_s(self) -> float:
        """The wait that one in a hundred exceeds."""
        ordered = sorted(self.waits_s)
        return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]


class Service:
    """The service under attack.

    Args:
        port: Its gateway's.
        pid: Its first process.
    """

    def __init__(self, port: int, pid: int) -> None:
        self.port, self.leader = port, psutil.Process(pid)

    def observe(self, attack: Input, seconds: float) -> Observed:
        """Send an input in a loop for so many seconds, and watch."""
        seen, done = Observed(), threading.Event()
        watchers = [threading.Thread(target=run, args=(seen, done)) for run in (self._ask, self._weigh)]
        with attacking(self.port, attack):
            for watcher in watchers:
                watcher.start()
            time.sleep(seconds)
            done.set()
            for watcher in watchers:
                watcher.join()
        return seen

    def anonymous(self, count: int) -> tuple[float, int]:
        """Send requests without a key; return the gateway's milliseconds of CPU for each, and new processes."""
        before_s, members = self._cpu_s(), len(family(self.leader))
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_ANSWER_S)
        with contextlib.closing(connection):
            for _ in range(count):
                connection.request("POST", CHAT, ONE_TOKEN, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                answer.read()
                if answer.status != http.HTTPStatus.UNAUTHORIZED:
                    raise SystemExit(f"a request without a key was answered with {answer.status}")
        return (self._cpu_s() - before_s) * 1000 / count, len(family(self.leader)) - members

    def _cpu_s(self) -> float:
        times = self.leader.cpu_times()
        return times.user + times.system

    def ask(self) -> tuple[float, str]:
        """Ask for one token as the other client; return the seconds, and what was wrong with the answer."""
        began = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_ANSWER_S)
        with contextlib.closing(connection):
            connection.request("POST", COMPLETIONS, ONE_TOKEN, _headers(BOB))
            answer = connection.getresponse()
            body = answer.read()
        return time.monotonic() - began, "" if answer.status == http.HTTPStatus.OK else body[:200].decode()

    def _ask(self, seen: Observed, done: threading.Event) -> None:
        while not done.is_set():
            try:
                seconds, fault = self.ask()
            except OSError as error:
                seconds, fault = _ANSWER_S, repr(error)
            seen.waits_s.append(seconds)
            if fault:
                seen.failed.append(fault)
            done.wait(_PAUSE_S)

    def _weigh(self, seen: Observed, done: threading.Event) -> None:
        while not done.is_set():
            seen.memory.append(memory_of(self.leader))
            done.wait(_MEMORY_S)


def _headers(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}


@contextmanager
def attacking(port: int, attack: Input) -> Iterator[None]:
    """Send an input in a loop, from a process of its own."""
    context = multiprocessing.get_context("fork")
    done = context.Event()
    process = context.Process(target=_attack, args=(port, attack, done), daemon=True)
    process.start()
    try:
        yield
    finally:
        done.set()
        process.join(1)
        process.kill()
        process.join()


def _attack(port: int, attack: Input, done: Event) -> None:
    threads = [
        threading.Thread(target=_loop, args=(port, attack, done), daemon=True) for _ in range(attack.connections)
    ]
    for thread in threads:
        thread.start()
    done.wait()


def _loop(port: int, attack: Input, done: Event) -> None:
    while not done.is_set():
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=_ANSWER_S) as client:
            body = attack.body()
            head = "".join(f"{name}: {value}\r\n" for name, value in _headers(ALICE).items())
            head = f"POST {attack.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n{head}"
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
            client.sendall(memoryview(body)[: attack.sent])
            if attack.leaves is not None:
                time.sleep(attack.leaves)
                continue
            while client.recv(1 << 20):
                pass


def main() -> int:
    """Attack, print the figures and save them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20, help="of each input")
    parser.add_argument("--only", help="inputs whose name has this; does not save results")
    arguments = parser.parse_args()
    report, port = Report("hold"), processes.free_port()
    with processes.running(processes.service(port), API_KEYS=f"alice={ALICE},bob={BOB}") as process:
        processes.wait_healthy(process, port)
        service = Service(port, process.pid)
        waits_s = sorted(service.ask()[0] for _ in range(100))
        report.add("p99 of one token at rest", waits_s[98], None, "s")
        rest = memory_of(service.leader)
        report.add("memory at rest", rest / 1024**2, None, "MiB")
        for attack in inputs():
            if arguments.only and arguments.only not in attack.name:
                continue
            seen = service.observe(attack, arguments.seconds)
            above = (max(seen.memory) - rest) / 1024**3
            print(
                f"{attack.name}: {len(seen.waits_s)} requests, {len(seen.failed)} failed {seen.failed[:1]}", flush=True
            )
            report.add(f"{attack.name}: another's p99", seen.p99_s, P99_S, "s")
            report.add(f"{attack.name}: another's failures", len(seen.failed), 0)
            report.add(f"{attack.name}: memory above rest", above, MEMORY_GIB, "GiB")
            print(*report.targets[-3:], sep="\n", flush=True)
            report.add(f"{attack.name}: load of the machine", os.getloadavg()[0])
        if not arguments.only:
            milliseconds, started = service.anonymous(ANONYMOUS)
            report.add("a request without a key: CPU", milliseconds, ANONYMOUS_MS, "ms")
            report.add(f"{ANONYMOUS} requests without a key: processes started", started, 0)
        time.sleep(5)
        report.add("memory above rest afterwards", (memory_of(service.leader) - rest) / 1024**3, None, "GiB")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    return report.finish(keep=not arguments.only)


if __name__ == "__main__":
    sys.exit(main())
