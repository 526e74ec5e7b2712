"""The engine's side of loading adapters: commands of the parent in, outcomes out, and vLLM's table in between."""

from __future__ import annotations

import asyncio
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from service.in_engine.vllm_service.adapters import Adapters


class Models:
    """vLLM's table of adapters, as far as this uses it."""

    def __init__(self) -> None:
        self.lora_requests: dict[str, Any] = {}
        self.lora_id_counter = SimpleNamespace(value=0)
        self.refuses: str | Exception | None = None

    async def load_lora_adapter(self, request: Any, base_model_name: str) -> Any:
        """Load, or refuse as vLLM does."""
        self.lora_id_counter.value += 1
        if isinstance(self.refuses, Exception):
            raise self.refuses
        if self.refuses:
            return SimpleNamespace(error=SimpleNamespace(message=self.refuses))
        self.lora_requests[request.lora_name] = SimpleNamespace(
            lora_int_id=self.lora_id_counter.value, path=request.lora_path, base=base_model_name
        )
        return "Success"


class Engine:
    """vLLM's engine client, as far as this uses it."""

    def __init__(self, room: int | None = 2) -> None:
        config = SimpleNamespace(max_cpu_loras=room) if room else None
        self.vllm_config = SimpleNamespace(lora_config=config)
        self.output_processor = SimpleNamespace(request_states={})
        self.removed: list[int] = []

    async def remove_lora(self, id_: int) -> bool:
        """Remove."""
        self.removed.append(id_)
        return True


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the one class of vLLM that is imported."""
    name = "vllm.entrypoints.serve.lora.protocol"
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    monkeypatch.setattr(sys.modules[name], "LoadLoRAAdapterRequest", SimpleNamespace, raising=False)


async def told(adapters: Adapters, command: str, name: str) -> dict[str, Any]:
    """Carry out a command, and return the outcome."""
    outcomes: list[dict[str, Any]] = []
    asked = {"command": command, "id": 7, "name": name, "path": f"/adapters/{name}"}
    await adapters.carry_out(asked, lambda **fields: outcomes.append(fields))
    (outcome,) = outcomes
    assert outcome["id"] == 7
    return outcome


def test_adapter_is_loaded_and_unloaded() -> None:
    """Requests may name it in between; one that is not there is unloaded already."""

    async def run() -> None:
        engine, models = Engine(), Models()
        adapters = Adapters(engine, models, "mine")
        assert await told(adapters, "load_adapter", "one") == {"id": 7, "error": None}
        assert (models.lora_requests["one"].path, models.lora_requests["one"].base) == ("/adapters/one", "mine")
        assert await told(adapters, "unload_adapter", "one") == {"id": 7, "error": None}
        assert (models.lora_requests, engine.removed) == ({}, [1])
        assert await told(adapters, "unload_adapter", "one") == {"id": 7, "error": None}

    asyncio.run(run())


@pytest.mark.parametrize(
    ("refuses", "error"),
    [("wrong\n  modules", "wrong modules"), (RuntimeError("no"), "RuntimeError: no"), ("x" * 9000, "x" * 500)],
)
def test_adapter_that_vllm_refuses_leaves_nothing_behind(refuses: str | Exception, error: str) -> None:
    """The reason is one line of bounded length."""

    async def run() -> None:
        engine, models = Engine(), Models()
        models.refuses = refuses
        assert (await told(Adapters(engine, models, "mine"), "load_adapter", "one"))["error"] == error
        assert engine.removed == ([] if isinstance(refuses, Exception) else [1])

    asyncio.run(run())


@pytest.mark.parametrize(("room", "error"), [(None, "without room for adapters"), (1, "the engine has 1 adapters")])
def test_adapter_beyond_the_room_is_refused(room: int | None, error: str) -> None:
    """VLLM would drop another one, and read it again in the middle of a batch."""

    async def run() -> None:
        models = Models()
        models.lora_requests["zero"] = SimpleNamespace(lora_int_id=1)
        assert error in (await told(Adapters(Engine(room), models, "mine"), "load_adapter", "one"))["error"]

    asyncio.run(run())


def test_adapter_is_unloaded_once_its_requests_have_ended() -> None:
    """New ones are refused at once; until then its name is not free, and others' requests do not matter."""

    async def run() -> None:
        engine, models = Engine(), Models()
        adapters = Adapters(engine, models, "mine")
        await adapters.load("one", "/one")
        states = engine.output_processor.request_states
        states |= {"a": SimpleNamespace(lora_name="one"), "b": SimpleNamespace(lora_name=None)}
        unloading = asyncio.create_task(adapters.unload("one"))
        await asyncio.sleep(0)
        assert (models.lora_requests, engine.removed) == ({}, [])
        assert "still run" in str(await adapters.load("one", "/other"))
        del states["a"]
        assert await unloading is None
        assert engine.removed == [1]
        assert await adapters.load("one", "/other") is None

    asyncio.run(run())
