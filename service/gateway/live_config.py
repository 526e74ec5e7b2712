"""Keys, limits and models of a gateway that serves: what has changed is read again, without a dropped request.

Changes of keys are seen within `POLL_S`, models on demand. What cannot be read, or is wrong, changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from service.errors import ServiceError, UsageError
from service.gateway.clients import ClientRegistry
from service.gateway.key_set import KeySet, KeySource
from service.gateway.router import ModelRouter
from service.gateway.threads import in_thread
from service.registry.entries import Adapter, with_adapter
from service.registry.models import Registry
from service.usage.database import Database
from service.usage.limits import day_begin, month_begin

POLL_S = 2.0  # a key that another process revokes is refused after this time
TOTALS_S = 30.0  # between two looks at what all gateways have used
_USED = """SELECT key, sum(tokens_in) + sum(tokens_out), sum(dollars) FROM hours WHERE hour >= :hour GROUP BY key"""
_log = logging.getLogger(__name__)


class LiveConfig:
    """Reads them again.

    Args:
        source: Where keys and limits come from.
        clients: Gets them.
        router: Gets the models.
        load_models: Reads the models, and raises a ServiceError where they are wrong; None: they cannot change here.
        prepare_models: Called with models before they are used, and the key of one whose adapters are fetched; raises a
            ServiceError where an engine refuses an adapter of theirs.
        on_models: Called with the models that are used from now on.
        record_adapter: Keeps an adapter that was loaded for a model, by its key; None: none can be loaded here.
        connect: Opens the ledger's database, for what the clients have used; None: there is no ledger.
        poll_s: Between two looks at the keys.
    """

    def __init__(
        self,
        source: KeySource,
        clients: ClientRegistry,
        router: ModelRouter,
        *,
        load_models: Callable[[], Registry] | None = None,
        prepare_models: Callable[[Registry, str | None], Awaitable[None]] | None = None,
        on_models: Callable[[Registry], None] = lambda _: None,
        record_adapter: Callable[[str, Adapter], None] | None = None,
        connect: Callable[[], Database] | None = None,
        poll_s: float = POLL_S,
    ) -> None:
        self.source, self.clients, self.router = source, clients, router
        self._load_models, self._on_models = load_models, on_models
        self._connect, self._poll_s = connect, poll_s
        self._prepare_models, self._record_adapter = prepare_models, record_adapter
        self._turn = asyncio.Lock()
        self._changing = asyncio.Lock()  # of models: a change may fetch an adapter, and keys are read meanwhile
        self._changes = -1
        self._failing = False
        self._reloading: asyncio.Future[None] | None = None

    async def watch(self) -> None:
        """Look for changes until it is cancelled."""
        totals_at = 0.0
        while True:
            await self._attempt(self.refresh_keys)
            if self._connect and time.monotonic() >= totals_at:
                totals_at = time.monotonic() + TOTALS_S
                await self._attempt(self._refresh_totals)
            await asyncio.sleep(self._poll_s)

    async def refresh_keys(self) -> None:
        """Take the keys and limits that there are now.

        Raises:
            ServiceError: They cannot be read; those before stay.
        """
        if not (store := self.source.store):
            return
        async with self._turn:
            registry = self.router.registry

            def read() -> tuple[int, KeySet | None]:
                changes = store.changes()  # first: a change between the two is seen next time
                return changes, None if changes == self._changes else self.source.load(registry)

            self._changes, keys = await in_thread(read)
            if keys:
                self.clients.replace(keys)

    async def reload(self) -> dict[str, int]:
        """Take models, keys and limits that there are now: all of them, or none. Return how many there are.

        Raises:
            ServiceError: One of them is wrong; all stay as they were.
        """
        async with self._changing:
            load = self._load_models or (lambda: self.router.registry)

            def read() -> Registry:
                registry = load()
                self.source.load(registry)
                return registry

            registry = await in_thread(read)
            keys = await self._take(registry)
        _log.info("Reloaded: %d models, %d keys.", len(registry.specs), len(keys.digests) + len(keys.stored))
        return {"models": len(registry.specs), "keys": len(keys.digests) + len(keys.stored)}

    async def add_adapter(self, model: str, adapter: Adapter) -> str:
        """Serve another adapter of a model, from now on and after a restart. Return the model's key.

        Raises:
            ServiceError: It cannot be fetched, or is refused; all stays as it was.
        """
        if (record := self._record_adapter) is None:
            raise UsageError(
                "This gateway loads no adapters while it serves: on Modal the engines of a deploy have those of its "
                "models file.",
                hint="Write the adapter into the models file, and deploy again.",
            )
        async with self._changing:
            registry = self.router.registry
            spec = registry.resolve(model, self.router.default).spec
            if adapter not in spec.adapters:
                changed = registry.replace({**registry.specs, spec.key: with_adapter(spec, adapter)})
                await self._take(changed, spec.key, lambda: record(spec.key, adapter))
        return spec.key

    async def _take(
        self, registry: Registry, fetched: str | None = None, record: Callable[[], None] = lambda: None
    ) -> KeySet:
        """Use these models and the keys that there are now, once engines have loaded what is new; or change nothing."""
        before = self.router.registry
        try:
            if self._prepare_models and registry is not before:
                await self._prepare_models(registry, fetched)
            async with self._turn:
                keys = await in_thread(lambda: self.source.load(registry))
                await in_thread(record)
                if registry is not before:
                    self._on_models(registry)
                    self.router.replace(registry)
                self.clients.replace(keys)
        except BaseException:
            if registry is not before:
                self._on_models(before)  # engines unload what they have loaded
            raise
        return keys

    def reload_soon(self) -> None:
        """Reload; where that is refused, say why."""

        async def reload() -> None:
            try:
                await self.reload()
            except ServiceError as error:
                _log.error("Nothing was reloaded: %s", error)

        self._reloading = asyncio.ensure_future(reload())

    async def _refresh_totals(self) -> None:
        now, connect = time.time(), self._connect
        day, month = day_begin(now), month_begin(now)

        def read() -> tuple[dict[str, float], dict[str, float]]:
            assert connect is not None  # noqa: S101 - the caller has looked
            database = connect()
            try:
                today = database.read(_USED, hour=int(day // 3600))
                this_month = database.read(_USED, hour=int(month // 3600))
            finally:
                database.close()
            return {row[0]: float(row[1] or 0) for row in today}, {row[0]: float(row[2] or 0) for row in this_month}

        tokens, dollars = await in_thread(read)
        for client in self.clients:
            client.day_tokens.observe(day, tokens.get(client.name, 0.0))
            client.month_dollars.observe(month, dollars.get(client.name, 0.0))

    async def _attempt(self, work: Callable[[], object]) -> None:
        """Do it; where that fails, say so once, and go on with what is known."""
        try:
            await work()  # type: ignore[misc]
        except Exception as error:  # noqa: BLE001 - whatever a database does, requests are served
            if not self._failing:
                _log.warning("Keys and limits stay as they are, since they cannot be read: %s", error)
            self._failing = True
        else:
            if self._failing:
                _log.warning("Keys and limits are read again.")
            self._failing = False
