"""Sends many inputs from several clients at once, and keeps what no service may answer."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from tests.engine.routes import error_of

from .targets import Answer, Target

CLIENTS = 8
# 503 that a client is told to repeat; any other 5xx is a find
BUSY = {"engine_overloaded", "overloaded_error", "too_many_bytes", "model_waking"}
TOLD = (b"Traceback", b'File "/', b"site-packages")
_FAILED = (b'"code": "engine_error"', b'"code": "internal_error"', b'"code": "engine_lost"', b'"type": "api_error"')
_SHOWN = 300


@dataclass(frozen=True)
class Input:
    """One request.

    Attributes:
        name: Which it is, such as a seed and a number: it can be made again by it.
        path: Its route.
        sent: Its bytes.
    """

    name: str
    path: str
    sent: bytes


@dataclass
class Outcome:
    """What came back.

    Attributes:
        statuses: How often each came.
        finds: Inputs whose answer is none that the service documents, with the reason.
        slowest_s: Of one answer.
        slowest: That input.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    finds: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    slowest: str = ""

    @property
    def inputs(self) -> int:
        """How many were sent."""
        return sum(self.statuses.values())

    def add(self, other: Outcome) -> None:
        """Add what came back of further inputs."""
        self.statuses += other.statuses
        self.finds += other.finds
        self.slowest_s, self.slowest = max((self.slowest_s, self.slowest), (other.slowest_s, other.slowest))


def fault(path: str, answer: Answer) -> str | None:
    """Return why no service may answer so; None: it may."""
    if not answer.status:
        return "closed without an answer"
    if any(words in answer.body for words in TOLD):
        return "tells of its insides"
    if answer.status >= 400:
        try:
            error = error_of(answer.body, path)
        except (AssertionError, ValueError, KeyError, TypeError):
            return "an error in another shape"
        is_busy = answer.status == 503 and "retry-after" in answer.headers
        if answer.status >= 500 and not (is_busy and error.get("code", error["type"]) in BUSY):
            return "a server error"
    elif answer.headers.get("content-type", "").startswith("text/event-stream"):
        return "a server error in a stream" if any(words in answer.body for words in _FAILED) else None
    return None


def barrage(target: Target, inputs: Iterable[Input], clients: int = CLIENTS) -> Outcome:
    """Send all inputs, as many at a time as there are clients; blocks."""
    outcome, lock, waiting = Outcome(), threading.Lock(), iter(inputs)
    with ThreadPoolExecutor(clients) as threads:
        for done in [threads.submit(_client, target, waiting, outcome, lock) for _ in range(clients)]:
            done.result()
    return outcome


def _client(target: Target, waiting: Iterator[Input], outcome: Outcome, lock: threading.Lock) -> None:
    with target.connection() as connection:
        while True:
            with lock:
                some = list(islice(waiting, 4))  # making inputs takes turns
            if not some:
                return
            for one in some:
                began = time.monotonic()
                try:
                    answer, why = connection.ask(one.sent), None
                except TimeoutError:
                    connection.close()
                    answer, why = Answer(0), "no answer in time"
                took_s = time.monotonic() - began
                with lock:
                    _keep(outcome, one, answer, why or fault(one.path, answer), took_s)


def _keep(outcome: Outcome, one: Input, answer: Answer, why: str | None, took_s: float) -> None:
    outcome.statuses[answer.status] += 1
    if why:
        body = one.sent.partition(b"\r\n\r\n")[2][:_SHOWN]
        outcome.finds.append(f"{one.name} {one.path}: {why}: {answer.status} {answer.body[:_SHOWN]!r} for {body!r}")
    if took_s > outcome.slowest_s:
        outcome.slowest_s, outcome.slowest = took_s, one.name
