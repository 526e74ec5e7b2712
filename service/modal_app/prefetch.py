"""Weights into Modal's volume, without a GPU: an app that lives as long as a prefetch does, and the lock of the fleet.

`fetch` is the function that runs there. It is made part of an app only when somebody asks, since whether it gets the
hub's secret depends on what is asked for; no GPU is ever attached to it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import modal

from service.engine.environment import pinned
from service.errors import ServiceError
from service.image import fast_transfer, light_image
from service.volumes import HUB_CACHE, volumes
from service.weights.dict_lock import DictLock
from service.weights.download_process import hub_token
from service.weights.prefetch import Order, Word, stock

APP = "vllm-prefetch"
LOCKS = "vllm-locks"
TIMEOUT_S = 24 * 3600  # the longest that Modal allows: half a terabyte at 6 MB/s
CPU, MEMORY_MB = 4.0, 4096  # Xet decompresses and checksums on every core it gets


def application(secret: str | None, volume_prefix: str | None) -> tuple[modal.App, Any]:
    """Return an app with the function, ready to be run.

    Args:
        secret: Name of the secret with HF_TOKEN, for gated models.
        volume_prefix: What the volume's name begins with.
    """
    app = modal.App(APP)
    wrapped = app.function(
        image=light_image().env(fast_transfer(pinned("light.lock", "huggingface-hub"))),
        volumes={HUB_CACHE: volumes(volume_prefix)[HUB_CACHE]},
        secrets=[modal.Secret.from_name(secret, required_keys=["HF_TOKEN"])] if secret else [],
        cpu=CPU,
        memory=MEMORY_MB,
        timeout=TIMEOUT_S,
    )(fetch)
    return app, wrapped


def fetch(order: str, volume_prefix: str | None) -> Iterator[str | Word | tuple[str, str]]:
    """Do an `Order`, which comes as JSON, in a container.

    The call's own id comes first, so that it can be cancelled; an error comes as its class's name and its sentence.
    """
    yield modal.current_function_call_id() or ""
    volume = volumes(volume_prefix)[HUB_CACHE]
    try:
        yield from stock(Order.model_validate_json(order), hub_token(os.environ), fleet_lock(volume))
        volume.commit()  # what was removed; each download was committed when its lock was given back
    except ServiceError as error:
        yield type(error).__name__, str(error)


def fleet_lock(volume: modal.Volume) -> DictLock:
    """Return the lock that keeps containers from fetching the same at once.

    Who gets it sees what others have committed, and commits before giving it back.
    """
    return DictLock(
        lambda: modal.Dict.from_name(LOCKS, create_if_missing=True),
        on_held=volume.reload,
        before_release=volume.commit,
    )
