"""LoRA adapters that the parent has this engine load and unload while it serves.

The commands come by the parent's pipe. vLLM's own routes for this take any path of any client, and stay closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from vllm_service.parent_pipe import Command

POLL_S = 0.05


class Adapters:
    """The adapters of this engine.

    Args:
        engine: vLLM's engine client.
        models: vLLM's table of models and adapters, by which requests are served.
        base_model: The name of the model that they change.
    """

    def __init__(self, engine: Any, models: Any, base_model: str) -> None:
        self._engine, self._models, self._base_model = engine, models, base_model
        self._leaving: set[str] = set()  # those of which requests still run

    async def load(self, name: str, path: str) -> str | None:
        """Load an adapter; from now on requests may name it. Return why it was refused, None when it was not."""
        from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

        config = self._engine.vllm_config.lora_config
        if config is None:
            return "the engine was started without room for adapters"
        if name in self._leaving:  # vLLM tells the adapters of a batch apart by their names
            return "requests of the one that had this name before still run"
        if len(self._models.lora_requests) + len(self._leaving) >= config.max_cpu_loras:
            return f"the engine has {config.max_cpu_loras} adapters, which is all that it has room for"
        outcome = await self._models.load_lora_adapter(
            LoadLoRAAdapterRequest(lora_name=name, lora_path=path), self._base_model
        )
        if isinstance(outcome, str):
            return None
        if name not in self._models.lora_requests:  # what vLLM registered before it failed takes up room
            await self._engine.remove_lora(self._models.lora_id_counter.value)
        return str(outcome.error.message)

    async def unload(self, name: str) -> str | None:
        """Refuse new requests of an adapter at once, and unload it once those that run have ended."""
        if (request := self._models.lora_requests.pop(name, None)) is None:
            return None
        self._leaving.add(name)
        try:
            states = self._engine.output_processor.request_states
            while any(state.lora_name == name for state in [*states.values()]):  # noqa: ASYNC110 - vLLM has no event
                await asyncio.sleep(POLL_S)
            await self._engine.remove_lora(request.lora_int_id)
        finally:
            self._leaving.discard(name)
        return None

    async def carry_out(self, command: Command, emit: Callable[..., None]) -> None:
        """Carry out a command of the parent, and emit the outcome."""
        try:
            if command["command"] == "load_adapter":
                error = await self.load(command["name"], command["path"])
            else:
                error = await self.unload(command["name"])
        except Exception as failure:  # noqa: BLE001 - whatever vLLM raises, the engine goes on
            error = f"{type(failure).__name__}: {failure}"
        emit(id=command["id"], error=error and " ".join(error.split())[:500])
