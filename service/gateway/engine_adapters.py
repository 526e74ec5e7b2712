"""The LoRA adapters of one running engine, which follow its entry while it serves.

An engine takes adapters only where it was started with room for them. Another source under a name that it has, or any
other change of the entry, needs another engine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

from service.errors import ServiceError
from service.gateway.threads import in_thread
from service.registry.models import Adapter, ModelSpec

_POLL_S = 0.05
_log = logging.getLogger(__name__)


class LoadsAdapters(Protocol):
    """What an engine does with adapters. Both methods block."""

    def load_adapter(self, name: str, directory: Path) -> None:
        """Load one; raises a ServiceError where it is refused."""

    def unload_adapter(self, name: str) -> None:
        """Forget one, once the requests of it that run have ended."""


def without_adapters(spec: ModelSpec) -> ModelSpec:
    """Return the entry without its adapters."""
    return spec.model_copy(update={"adapters": ()})


class EngineAdapters:
    """The adapters of an engine.

    Args:
        engine: The engine, which need not be ready yet.
        spec: The entry that it is started with.
        fetch: Fetches and checks the adapters of an entry, and returns their directories; blocks.
        older_requests: Returns a function that tells whether a request which runs now is still running.
    """

    def __init__(
        self,
        engine: LoadsAdapters,
        spec: ModelSpec,
        fetch: Callable[[ModelSpec], Mapping[str, Path]],
        older_requests: Callable[[], Callable[[], bool]],
    ) -> None:
        self.engine, self._fetch, self._older_requests = engine, fetch, older_requests
        self._base, self._room = without_adapters(spec), spec.adapter_room
        self._loaded = {adapter.name: adapter for adapter in spec.adapters}
        self._wanted = spec
        self.is_ready = False
        self._turn = asyncio.Lock()
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self._loading: asyncio.Task[None] | None = None

    def can_follow(self, spec: ModelSpec) -> bool:
        """Tell whether this engine can serve an entry as it is now."""
        names = {adapter.name for adapter in spec.adapters}
        return (
            without_adapters(spec) == self._base
            and len(self._loaded.keys() | names) <= self._room
            and all(self._loaded.get(adapter.name, adapter) == adapter for adapter in spec.adapters)
        )

    async def add(self, spec: ModelSpec) -> None:
        """Load those adapters of an entry that the engine lacks; one that is not ready yet loads them once it is.

        Raises:
            ServiceError: One of them cannot be fetched, or is refused. The engine serves on.
        """
        async with self._turn:
            if not self._missing(spec):
                return
            directories = await in_thread(lambda: self._fetch(spec))
            for adapter in self._missing(spec) if self.is_ready else ():
                await in_thread(partial(self.engine.load_adapter, adapter.name, directories[adapter.name]))
                self._loaded[adapter.name] = adapter

    def follow(self, spec: ModelSpec) -> None:
        """Have the engine serve the adapters of an entry from now on: unload others, and load what is missing."""
        self._wanted = spec
        if not self.is_ready:
            return
        wanted = {adapter.name for adapter in spec.adapters}
        for name in self._loaded.keys() - wanted - self._leaving.keys():
            self._leaving[name] = asyncio.ensure_future(self._unload(name, self._older_requests()))
        if self._missing(spec) and (self._loading is None or self._loading.done()):
            self._loading = asyncio.ensure_future(self._load_missing())

    async def begin(self) -> None:
        """Follow what the entry has become while the engine started."""
        self.is_ready = True
        self.follow(self._wanted)
        if self._loading:
            await self._loading

    def _missing(self, spec: ModelSpec) -> list[Adapter]:
        return [adapter for adapter in spec.adapters if adapter.name not in self._loaded]

    async def _load_missing(self) -> None:
        while self._missing(spec := self._wanted):
            try:
                await self.add(spec)
            except ServiceError as error:
                if spec is self._wanted:
                    _log.error("Model '%s' is served without an adapter of its entry: %s", spec.key, error)
                    return

    async def _unload(self, name: str, has_older: Callable[[], bool]) -> None:
        try:
            while has_older():  # noqa: ASYNC110 - a request that was routed before may still name it
                await asyncio.sleep(_POLL_S)
            if name not in {adapter.name for adapter in self._wanted.adapters}:  # else it has come back
                del self._loaded[name]
                await in_thread(lambda: self.engine.unload_adapter(name))
                _log.info("Adapter '%s' of model '%s' is unloaded.", name, self._wanted.key)
        except ServiceError as error:  # the engine has ended, and its adapters with it
            _log.warning("Adapter '%s' of model '%s' was not unloaded: %s", name, self._wanted.key, error)
        finally:
            del self._leaving[name]
