"""Fetches weights into Modal's volume without a GPU: an app that lives as long as a prefetch, and a lease.

`fetch` is the function that runs there. It becomes part of an app only when a prefetch is requested, since whether it
gets the hub's secret depends on the request; no GPU is ever attached to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import modal

from service.engine.environment import pinned
from service.errors import ServiceError
from service.image import light_image, transfer_env
from service.modal_app.leases import volume_lease
from service.volumes import HUB_CACHE, volumes
from service.weights.prefetch import PrefetchEvent, PrefetchRequest
from service.weights.prefetch import prefetch as prefetch_here

APP = "vllm-prefetch"
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
        image=light_image().env(transfer_env(pinned("light.lock", "huggingface-hub"))),
        volumes={HUB_CACHE: volumes(volume_prefix)[HUB_CACHE]},
        secrets=[modal.Secret.from_name(secret, required_keys=["HF_TOKEN"])] if secret else [],
        cpu=CPU,
        memory=MEMORY_MB,
        timeout=TIMEOUT_S,
    )(fetch)
    return app, wrapped


def fetch(request: str, volume_prefix: str | None) -> Iterator[str | PrefetchEvent | dict[str, str]]:
    """Do a `PrefetchRequest`, which comes as JSON, in a container.

    The call's own id comes first, so that it can be cancelled; an error comes as `ServiceError.to_fields` has it.
    """
    yield modal.current_function_call_id() or ""
    volume = volumes(volume_prefix)[HUB_CACHE]
    try:
        yield from prefetch_here(PrefetchRequest.model_validate_json(request), volume_lease(volume, volume_prefix))
        volume.commit()  # what was removed; each download was committed when its lease was released
    except ServiceError as error:
        yield error.to_fields()
