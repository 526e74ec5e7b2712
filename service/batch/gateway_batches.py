"""Files and batches of a gateway that drives them itself: a task beside it, which goes on after a restart."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout
from starlette.routing import Route

from service.batch.batches_api import BatchesApi
from service.batch.commit_log import INTERVAL_S, nothing
from service.batch.files_api import FilesApi
from service.batch.lines import Line
from service.batch.runner import BatchRunner
from service.batch.store import Batch, ClientStore, Store, local_root
from service.batch.worker import Answer, Send
from service.errors import one_line
from service.gateway.own_requests import OwnRequests
from service.in_engine.vllm_service.api_error import APIError
from service.weights.locks import NO_LOCKS

_LOCK_S = 3.0  # between two tries for the lock
_log = logging.getLogger(__name__)


async def begin_at_once(_store: ClientStore, _batch: Batch) -> None:
    """Do nothing more: the gateway is up as long as it has a batch."""


class GatewayBatches:
    """The routes of files and batches, and what drives the batches.

    Args:
        store: Default: this machine's.
        interval_s: Between two commits.
        commit: Makes what was written outlive the machine. Blocks.
        on_create: Called with each batch that is created; where it fails, that is logged.
        driving: Keeps gateways of other machines from driving batches while the block lasts. Where it can do so no
            longer it ends the block, and is entered again.
    """

    def __init__(
        self,
        store: Store | None = None,
        *,
        interval_s: float = INTERVAL_S,
        commit: Callable[[], None] = nothing,
        on_create: Callable[[ClientStore, Batch], Awaitable[None]] = begin_at_once,
        driving: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
    ) -> None:
        self._store = store or Store(local_root())
        self._interval_s, self._commit, self._on_create = interval_s, commit, on_create
        self._driving = driving
        self._runner: BatchRunner | None = None

    def routes(self) -> list[Route]:
        """Return the routes as Starlette has them."""
        return [*FilesApi(self._store).routes(), *BatchesApi(self._store, self._begin, self._wake).routes()]

    async def run(self, requests: OwnRequests) -> None:
        """Drive batches until it is cancelled; while another gateway drives those of the same directory, wait."""
        while True:
            async with self._driving():
                lock = driver_lock(self._store)
                try:
                    while not _is_held(lock):  # noqa: ASYNC110 - another process holds it
                        await asyncio.sleep(_LOCK_S)
                    await self._drive(requests)
                finally:
                    self._runner = None
                    lock.release()

    async def _drive(self, requests: OwnRequests) -> None:
        self._runner = BatchRunner(
            self._store,
            partial(sender, requests),
            interval_s=self._interval_s,
            commit=self._commit,
        )
        await self._runner.run()

    async def _begin(self, store: ClientStore, batch: Batch) -> None:
        try:
            await self._on_create(store, batch)
        except Exception as error:  # noqa: BLE001 - the batch is there: a client that repeats its request makes another
            _log.warning("What follows the creation of %s failed: %s", batch.id, one_line(error))
        self._wake()

    def _wake(self) -> None:
        if self._runner:
            self._runner.wake()


def driver_lock(store: Store) -> FileLock:
    """Return the lock of the one gateway that drives the batches of a directory, which the kernel releases with it."""
    return FileLock(store.root / "driver.lock", thread_local=False, fallback_to_soft=False)


def _is_held(lock: FileLock) -> bool:
    """Take the lock, and tell whether it is held; a file system without locks has one gateway only. Blocks."""
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock.acquire(blocking=False)
    except Timeout:
        return False
    except NotImplementedError:
        return True
    except OSError as error:
        if error.errno in NO_LOCKS:
            return True
        _log.warning("Batches are not driven: '%s' cannot be locked: %s", lock.lock_file, one_line(error))
        return False
    return True


def sender(requests: OwnRequests, store: ClientStore) -> Send:
    """Return what sends the lines of a client through its gateway."""
    owner, identity = store.owner, store.identity

    async def send(line: Line) -> Answer:
        try:
            answer = await requests.post(owner, identity, line.url, line.body)
        except APIError as error:
            retry_after_s = _seconds(error.headers.get("Retry-After", ""))
            return Answer(error.status, error.body(line.url, ""), retry_after_s=retry_after_s, code=error.code)
        log, tokens = answer.log, answer.log.tokens() or (0, 0)
        return Answer(
            answer.status,
            answer.body,
            log.id,
            retry_after_s=_seconds(answer.headers.get(b"retry-after", b"")),
            code=log.code,
            tokens_in=tokens[0],
            tokens_out=tokens[1],
            dollars=log.dollars or 0.0,
            model=f"{log.model} on {log.pool}",
        )

    return send


def _seconds(retry_after: str | bytes) -> float | None:
    return float(retry_after) if retry_after.isdigit() else None
