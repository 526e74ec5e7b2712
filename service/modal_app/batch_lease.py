"""One gateway drives the batches of an app: while that of an earlier deploy still does, the next one waits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager

import modal

from service.errors import one_line
from service.gateway.threads import in_thread
from service.modal_app.leases import volume_lease

_RETRY_S = 5.0
_log = logging.getLogger(__name__)


@asynccontextmanager
async def driving(
    app: str, volume: modal.Volume, commit: Callable[[], None], volume_prefix: str | None
) -> AsyncIterator[None]:
    """Wait until no other gateway of an app drives batches, and let none while the block lasts.

    Args:
        app: Whose gateway it is.
        volume: Has the batches; what the gateway before wrote is shown first.
        commit: Shows others what this gateway has written. Blocks.
        volume_prefix: What the names of the service's volumes begin with.
    """
    lease = volume_lease(volume, volume_prefix, commit)
    with ExitStack() as held:
        while True:
            try:
                await in_thread(lambda: held.enter_context(lease.held(f"the batches of {app}")))
                break
            except Exception as error:  # noqa: BLE001 - Modal's client raises many; a file that is open stops a reload
                _log.warning("Batches wait: %s", one_line(error))
                await asyncio.sleep(_RETRY_S)
        try:
            yield
        finally:
            await in_thread(held.close)
