"""Threads in which the engine core compiles grammars: clients take turns there too.

vLLM compiles in the order of the requests, of all clients, and also for requests that have ended meanwhile. So one
client with many constraints that compile for just under 2 s each, which `constraint_check` lets pass, would hold up
the structured outputs of all others for minutes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from vllm_service.client_turns import Shares

WORKERS = 2  # at most: each may need the 500 MiB that a constraint may take
CLIENT = "vllm_service_client"  # the entry of `SamplingParams.extra_args` with the client's name

Compile = Callable[[Any], Any]


class GrammarExecutor:
    """What vLLM's `StructuredOutputManager` uses of an executor; belongs to it.

    Args:
        workers: Threads.
    """

    def __init__(self, workers: int) -> None:
        self._threads = ThreadPoolExecutor(workers)
        self._lock = threading.Lock()
        self._waiting: dict[str, deque[tuple[Future[Any], Compile, Any]]] = {}
        self._shares = Shares()

    def submit(self, compile_: Compile, request: Any) -> Future[Any]:
        """Compile a request's grammar when its client's turn has come, unless the request has ended by then."""
        name = (request.sampling_params.extra_args or {}).get(CLIENT, "")
        future: Future[Any] = Future()
        with self._lock:
            if not self._waiting:
                self._shares.reset()
            self._shares.come(name)
            self._waiting.setdefault(name, deque()).append((future, compile_, request))
        self._threads.submit(self._run_next)
        return future

    def shutdown(self, *, wait: bool, cancel_futures: bool) -> None:
        """End the threads."""
        self._threads.shutdown(wait=wait, cancel_futures=cancel_futures)

    def _run_next(self) -> None:
        name, future, compile_, request = self._next()
        if request.is_finished():
            future.cancel()
            return
        begun = time.monotonic()
        try:
            future.set_result(compile_(request))
        except BaseException as error:  # noqa: BLE001 - libraries raise whatever they like, and the scheduler looks at it
            future.set_exception(error)
        with self._lock:
            self._shares.charge(name, time.monotonic() - begun, self._waiting)

    def _next(self) -> tuple[str, Future[Any], Compile, Any]:
        with self._lock:
            name = self._shares.next(self._waiting)
            queue = self._waiting[name]
            found = queue.popleft()
            if not queue:
                del self._waiting[name]
            return (name, *found)
