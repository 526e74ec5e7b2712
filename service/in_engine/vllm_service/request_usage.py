"""Counts what each request uses of this engine: tokens, and its share of the time in which requests run.

vLLM keeps a state for each sequence, with its counts, until that has ended or was aborted. The states of a request are
collected here when vLLM makes them, so that a token costs nothing and an aborted request is counted like any other.
"""

from __future__ import annotations

import contextvars
import time
from collections.abc import Callable
from typing import Any

from vllm_service.usage_report import EngineUsage

current: contextvars.ContextVar[RequestUsage | None] = contextvars.ContextVar("usage", default=None)  # by the guard


class RunningTime:
    """The seconds in which requests run, each divided among the requests that run in it. Belongs to one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._running, self._each_s, self._at = 0, 0.0, 0.0

    def begin(self) -> float:
        """Begin a request; return what `share` and `end` need."""
        begun = self._advance()
        self._running += 1
        return begun

    def share(self, begun: float) -> float:
        """Return the share so far of a request that runs."""
        return self._advance() - begun

    def end(self) -> None:
        """End a request."""
        self._advance()
        self._running -= 1

    def _advance(self) -> float:
        """Return the seconds that a request which was always there would have."""
        now = self._clock()
        if self._running:
            self._each_s += (now - self._at) / self._running
        self._at = now
        return self._each_s


class RequestUsage:
    """What one request uses.

    Args:
        running: The engine's.

    Attributes:
        is_reported: The client of this engine was told.
    """

    def __init__(self, running: RunningTime) -> None:
        self._running, self._begun = running, running.begin()
        self._states: list[Any] = []
        self.is_reported = False

    def add(self, state: Any) -> None:
        """Count a sequence: vLLM's `RequestState`."""
        self._states.append(state)

    @property
    def has_run(self) -> bool:
        """Whether the engine core was given anything to do."""
        return bool(self._states)

    def report(self) -> EngineUsage:
        """Return what was used so far."""
        tokens_in = cached = tokens_out = 0
        for state in self._states:
            if state.is_prefilling:
                continue
            if state.request_index == 0:  # of n answers each has the same prompt
                tokens_in, cached = tokens_in + state.prompt_len, cached + state.num_cached_tokens
            if state.detokenizer:
                tokens_out += state.detokenizer.num_output_tokens()
        return EngineUsage(tokens_in, cached, tokens_out, self._running.share(self._begun))

    def close(self) -> None:
        """End it."""
        self._running.end()


def enable(engine: Any) -> None:
    """Count the sequences of this engine: `engine` is vLLM's `AsyncLLM`."""
    processor = engine.output_processor
    add_request = processor.add_request

    def counted(request: Any, *args: Any, **kwargs: Any) -> None:
        add_request(request, *args, **kwargs)
        if usage := current.get():
            usage.add(processor.request_states[request.request_id])

    processor.add_request = counted
