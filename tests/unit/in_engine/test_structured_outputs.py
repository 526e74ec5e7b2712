"""The plugin's changes to vLLM's structured outputs, with stand-ins for vLLM's classes."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from vllm_service import structured_outputs


class Manager:
    """What the change uses of vLLM's `StructuredOutputManager`: the first request decides on the backend of all."""

    def __init__(self, backend: str = "auto", tokens: int = 100) -> None:
        self.backend: str | None = None
        self.tokenizer = range(tokens)
        self.vllm_config = SimpleNamespace(
            structured_outputs_config=SimpleNamespace(backend=backend, disable_any_whitespace=False),
            model_config=SimpleNamespace(get_vocab_size=lambda: 100),
        )
        self.compiled: list[str | None] = []
        self.executor: Any = ThreadPoolExecutor(8)

    def grammar_init(self, request: Any) -> None:
        """Compile with the backend that there is, and build it if there is none."""
        if self.backend is None:
            self.backend = request.sampling_params.structured_outputs._backend
        self.compiled.append(self.backend)


@pytest.fixture
def manager_class(monkeypatch: pytest.MonkeyPatch) -> type[Manager]:
    """The class after the change."""
    changed = type("Manager", (Manager,), {"grammar_init": Manager.grammar_init})
    module: Any = ModuleType("vllm.v1.structured_output")
    module.StructuredOutputManager = changed
    monkeypatch.setitem(sys.modules, "vllm.v1.structured_output", module)
    structured_outputs._compile_with_the_chosen_backend()
    return changed


def request(backend: str) -> Any:
    """Return a request for which vLLM chose a backend."""
    outputs = SimpleNamespace(_backend=backend)
    return SimpleNamespace(
        structured_output_request=object(), sampling_params=SimpleNamespace(structured_outputs=outputs)
    )


def test_requests_are_compiled_by_the_backend_chosen_for_each(manager_class: type[Manager]) -> None:
    """In any order; the first backend stays the one that allocates the bitmask."""
    manager = manager_class()
    for backend in ("xgrammar", "guidance", "outlines", "xgrammar", "guidance"):
        manager.grammar_init(request(backend))

    assert manager.compiled == ["xgrammar", "guidance", "outlines", "xgrammar", "guidance"]
    assert manager.backend == "xgrammar"


def test_request_without_a_constraint_builds_no_backend(manager_class: type[Manager]) -> None:
    """Nothing is compiled for it."""
    manager = manager_class()
    manager.grammar_init(SimpleNamespace(structured_output_request=None))

    assert manager.backend is None
    assert not manager.compiled


@pytest.mark.parametrize(("tokens", "compiled"), [(128, "guidance"), (129, "xgrammar")])
def test_backends_share_an_engine_only_if_their_bitmasks_are_equally_wide(
    manager_class: type[Manager], tokens: int, compiled: str
) -> None:
    """Bitmasks have a word for 32 tokens; guidance counts the tokenizer's, the others the model's 100."""
    manager = manager_class(tokens=tokens)
    manager.grammar_init(request("xgrammar"))
    manager.grammar_init(request("guidance"))

    assert manager.compiled == ["xgrammar", compiled]


@pytest.mark.parametrize(("backend", "is_switched"), [("auto", True), ("xgrammar", False)])
def test_white_space_is_switched_off_only_where_the_command_line_cannot(
    manager_class: type[Manager], backend: str, is_switched: bool
) -> None:
    """An entry that names a backend says itself what it wants."""
    manager = manager_class(backend)
    manager.grammar_init(request("xgrammar"))

    assert manager.vllm_config.structured_outputs_config.disable_any_whitespace is is_switched
