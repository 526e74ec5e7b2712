"""One gateway drives the batches of an app: while that of an earlier deploy still does, the next one waits.

A gateway that could not renew its lease for so long that the next one may have it soon, stops driving and waits too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from typing import Any

import modal

from service.errors import one_line
from service.gateway.threads import in_thread
from service.modal_app.leases import volume_lease
from service.weights.locks import Tenure

_RETRY_S = 5.0
_LOOK_S = 1.0
_log = logging.getLogger(__name__)


@asynccontextmanager
async def driving(
    app: str, volume: modal.Volume, commit: Callable[[], None], volume_prefix: str | None
) -> AsyncIterator[None]:
    """Wait until no other gateway of an app drives batches, and let none while the block lasts.

    Where the lease is lost the block is cancelled, and leaving it raises nothing: it may be entered again.

    Args:
        app: Whose gateway it is.
        volume: Has the batches; what the gateway before wrote is shown first.
        commit: Shows others what this gateway has written. Blocks.
        volume_prefix: What the names of the service's volumes begin with.
    """
    tenure: Tenure | None = None

    def commit_own() -> None:
        if tenure and tenure.is_certain:  # else these files may be another's by now
            commit()

    lease = volume_lease(volume, volume_prefix, commit_own)
    with ExitStack() as held:
        while tenure is None:
            try:
                tenure = await in_thread(lambda: held.enter_context(lease.held(f"the batches of {app}")))
            except Exception as error:  # noqa: BLE001 - Modal's client raises many; a file that is open stops a reload
                _log.warning("Batches wait: %s", one_line(error))
                await asyncio.sleep(_RETRY_S)
        task = asyncio.current_task()
        watching = asyncio.create_task(_cancel_at_loss(tenure, task), name="watch the lease of batches")
        try:
            yield
        except asyncio.CancelledError:
            if not watching.done() or task is None or task.uncancel():  # somebody else cancelled it
                raise
            _log.warning("Batches wait: the lease of %s could not be renewed, and another gateway may have it.", app)
        finally:
            watching.cancel()
            await in_thread(partial(_release, held))


async def _cancel_at_loss(tenure: Tenure, task: asyncio.Task[Any] | None) -> None:
    while tenure.is_certain:  # noqa: ASYNC110 - it ends by the clock, whatever becomes of the thread that renews it
        await asyncio.sleep(_LOOK_S)
    if task:
        task.cancel()


def _release(held: ExitStack) -> None:
    try:
        held.close()
    except Exception as error:  # noqa: BLE001 - it expires
        _log.warning("The lease of batches was not released: %s", one_line(error))
