"""Threads that compile grammars: whose comes next, and which are left out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from vllm_service import grammar_executor
from vllm_service.grammar_executor import CLIENT, GrammarExecutor


@dataclass
class Params:
    """What is used of vLLM's `SamplingParams`."""

    extra_args: dict[str, Any] | None


@dataclass
class Request:
    """What is used of vLLM's `Request`."""

    sampling_params: Params
    name: str
    has_ended: bool = False

    def is_finished(self) -> bool:
        """Tell whether the request has ended."""
        return self.has_ended


class Compiler:
    """Compiles while nobody holds the gate; `order` has the requests that it has begun."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate = threading.Event()
        self.order: list[str] = []
        self.now_s = 0.0
        self._executor = GrammarExecutor(1)
        monkeypatch.setattr(grammar_executor.time, "monotonic", lambda: self.now_s)

    def submit(self, client: str | None, name: str) -> tuple[Any, Request]:
        """Submit a request of a client; return its future too."""
        request = Request(Params(None if client is None else {CLIENT: client}), name)
        return self._executor.submit(self.compile, request), request

    def compile(self, request: Request) -> str:
        """Return what the request's grammar became."""
        self.gate.wait(10)
        self.order.append(request.name)
        self.now_s += 2.0 if request.name.startswith("slow") else 0.1
        if request.name == "odd":
            raise ValueError("odd")
        return f"grammar of {request.name}"

    def close(self) -> None:
        """End the thread."""
        self.gate.set()
        self._executor.shutdown(wait=True, cancel_futures=False)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    """A compiler with one thread."""
    compiler = Compiler(monkeypatch)
    yield compiler
    compiler.close()


def test_grammars_of_a_client_with_many_do_not_hold_up_another(compiler: Compiler) -> None:
    """Only the one at work comes before those of a client that comes later."""
    slow = [compiler.submit("one", f"slow {number}")[0] for number in range(5)]
    quick = [compiler.submit("two", f"quick {number}")[0] for number in range(3)]
    compiler.gate.set()

    assert [future.result(10) for future in quick] == [f"grammar of quick {number}" for number in range(3)]
    assert slow[-1].result(10) == "grammar of slow 4"
    assert compiler.order[1:4] == ["quick 0", "quick 1", "quick 2"]


def test_grammar_of_a_request_that_has_ended_is_not_compiled(compiler: Compiler) -> None:
    """Its client has left."""
    first, _ = compiler.submit("one", "first")
    left, request = compiler.submit("one", "left")
    request.has_ended = True
    last, _ = compiler.submit(None, "last")
    compiler.gate.set()

    assert {first.result(10), last.result(10)} == {"grammar of first", "grammar of last"}
    compiler.close()
    assert left.cancelled()
    assert "left" not in compiler.order


def test_grammar_that_does_not_compile_fails_its_request_alone(compiler: Compiler) -> None:
    """The scheduler finds the exception in the future."""
    odd, next_ = compiler.submit("one", "odd")[0], compiler.submit("one", "next")[0]
    compiler.gate.set()

    assert next_.result(10) == "grammar of next"
    assert str(odd.exception(10)) == "odd"
