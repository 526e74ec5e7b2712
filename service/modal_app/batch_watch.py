"""Keeps the gateway on Modal up while it drives a batch: without a request for a while its container would end.

The gateway drives every batch itself, since it counts limits, dollars and wakes in one process. A function that is
called for each batch asks the gateway for its health at intervals, until the batch has ended. A gateway that ended all
the same is started again by the next of these requests, and goes on from what it had committed to the volume.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress

import httpx2

from service.batch.store import Store

CPU, MEMORY_MB = 0.125, 256
TIMEOUT_S = 24 * 3600  # the longest that Modal lets a call run, and the longest completion window
RETRIES = 10
COMMIT_INTERVAL_S = 10.0
_ASK_S = 30.0  # a tenth of the gateway's scaledown window
_ANSWER_S = 120.0  # a gateway that starts
_log = logging.getLogger(__name__)


def watch(
    store: Store,
    owner: str,
    identity: str,
    name: str,
    url: str,
    *,
    reload: Callable[[], None],
    pause: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.time,
) -> str:
    """Keep the gateway at a URL up until a batch has ended, and return its status. Blocks.

    Args:
        store: Has the batch.
        owner: The name of its key.
        identity: Which of all clients of this name has it.
        name: Its id.
        url: The gateway's.
        reload: Shows what the gateway has committed.
        pause: Waits.
        clock: Seconds since 1970.
    """
    while True:
        with suppress(Exception):  # a volume that cannot be reloaded now is reloaded next time
            reload()
        batch = store.of(owner, identity).batch(name)
        if batch is None:
            return "deleted"
        if batch.is_final or clock() > batch.expires_at + _ANSWER_S:
            return batch.status
        try:
            httpx2.get(f"{url}/health", timeout=_ANSWER_S)
        except httpx2.HTTPError as error:
            _log.warning("The gateway did not answer: %s", type(error).__name__)
        pause(_ASK_S)
