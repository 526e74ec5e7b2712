"""Wiring of the public gateway to Modal: `modal deploy -m service.gateway_app` publishes `serve` of app `vllm-gateway`.

It has no GPU, and no request without a key starts one. One container has all requests: limits of a key are counted, and
the one wake of a pool is shared, in its process. Keys are read after a restore, so that no snapshot contains them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Mapping
from functools import partial

import modal

from service import keys
from service.batch.gateway_batches import GatewayBatches
from service.batch.store import Batch, ClientStore, Store
from service.errors import SettingsError, UsageError, one_line
from service.gateway import tracing
from service.gateway.app import Gateway, create_app
from service.gateway.boot_volume import BootVolume
from service.gateway.call_rate import CALL_S
from service.gateway.clients import ClientRegistry
from service.gateway.gauges import SpendGauges
from service.gateway.held import HeldRequests
from service.gateway.key_set import KeySource
from service.gateway.live_config import LiveConfig
from service.gateway.metrics import Metrics
from service.gateway.modal_pool import PROXY_SECRET
from service.gateway.origins import OriginPolicy
from service.gateway.process_limits import raise_process_limits
from service.gateway.router import ModelRouter
from service.gateway.webhook import CrashLoops, Webhook
from service.image import light_image, with_settings
from service.modal_app import batch_lease, batch_watch, otel_secret, spend_limits, warm
from service.modal_app.container_logging import log_to_stdout
from service.modal_app.gateway_deployment import GatewayDeployment
from service.modal_app.spend_limits import limited_tiers
from service.registry.models import Registry
from service.settings import Settings, database_url
from service.usage.database import database_opener
from service.usage.key_files import FileKeys
from service.usage.key_records import KeyStore, database_keys
from service.usage.ledger import KEPT_S, Ledger
from service.usage.shared import SharedLedger
from service.volumes import (
    BATCHES,
    GATEWAY,
    VLLM_CACHE,
    batches_directory,
    batches_volume,
    commit_with_open_files,
    gateway_volume,
    keys_directory,
    usage_directory,
    usage_volume,
    volume_name,
)

_log = logging.getLogger(__name__)
MAX_INPUTS = 1000  # the most that Modal gives one container


def create_modal_app(settings: Settings, registry: Registry, environ: Mapping[str, str]) -> Gateway:
    """Return the gateway to the deployed tiers; keys and proxy token are read from `environ`, keys kept as digests.

    Raises:
        UsageError: No key is configured, or the proxy token is missing.
    """
    digests = keys.digests(environ)
    if not digests:
        raise UsageError(
            f"Secret '{settings.keys_secret}' has neither API_KEY nor API_KEYS, and without a key every "
            "request would start a GPU container.",
            hint=f"Put one in: modal secret create --force {settings.keys_secret} API_KEY=<key>.",
        )
    metrics = Metrics(_write_line, _ledger(environ))
    notify = Webhook.from_environ(environ, DEPLOYMENT.app_name)
    on_wake = CrashLoops(notify, metrics.count_wake).count_wake
    volume = BootVolume(volume_name(VLLM_CACHE, settings.volume_prefix))
    deployment = GatewayDeployment(settings, registry)
    tiers, guard, watch = limited_tiers(deployment, _proxy_headers(settings, environ), on_wake, volume, notify)
    if guard:
        metrics.registry.register(SpendGauges(guard))
    source = KeySource(environ, digests, _key_store(settings, environ), settings.model)
    clients = ClientRegistry.of(source.load_at_start(registry))
    router, origins = ModelRouter(registry, settings.model, tiers.pool), OriginPolicy.from_settings(settings)
    return create_app(
        router,
        clients,
        metrics,
        hold_s=settings.hold_s,
        max_n=settings.max_n,
        held=HeldRequests.from_settings(settings),
        origins=origins,
        watch=watch,
        tracing=tracing.from_environ(environ),
        config=LiveConfig(source, clients, router, connect=metrics.ledger.connect if metrics.ledger else None),
        extension=_batches(settings),
    )


def _batches(settings: Settings) -> GatewayBatches:
    """Return files and batches on their volume; a call of `watch_batch` keeps the container up for each batch."""
    volume = BATCHES_VOLUME[BATCHES]
    publish = partial(commit_with_open_files, volume)

    def commit() -> None:
        try:
            publish()
        except OSError as error:  # the next commit has it too
            _log.warning("Batches: %s", one_line(error))

    async def on_create(store: ClientStore, batch: Batch) -> None:
        # where this fails, requests keep the gateway up all the same, and its next start goes on
        async with asyncio.timeout(CALL_S):
            await watch_batch.spawn.aio(store.owner, store.identity, batch.id)

    store = Store(batches_directory(DEPLOYMENT.app_name), publish)
    interval_s = batch_watch.COMMIT_INTERVAL_S
    driving = partial(batch_lease.driving, DEPLOYMENT.app_name, volume, commit, settings.volume_prefix)
    return GatewayBatches(store, interval_s=interval_s, commit=commit, on_create=on_create, driving=driving)


def _key_store(settings: Settings, environ: Mapping[str, str]) -> KeyStore | None:
    """Return where the keys are that operators make; None: nowhere, since the engines check those of the secret."""
    if settings.direct_auth == "keys":
        return None
    if url := database_url(environ):
        return database_keys(url)
    return FileKeys(keys_directory(), KEYS_VOLUME[GATEWAY].commit)


def _ledger(environ: Mapping[str, str]) -> Ledger:
    """Return the ledger: in PostgreSQL where it is configured, else on the container's disk and the volume."""
    url = database_url(environ)
    shared = SharedLedger(usage_directory(), VOLUME[VLLM_CACHE].commit, exports=url is None)
    # what is in files stays in them, and in each container's database
    return Ledger(database_opener(url), shared=shared, kept_s=KEPT_S if url else None)


def _proxy_headers(settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the headers that Modal's proxy needs in front of the tiers; none where the engines check keys."""
    if settings.direct_auth == "keys":
        return {}
    try:
        return {"Modal-Key": environ["MODAL_KEY"], "Modal-Secret": environ["MODAL_SECRET"]}
    except KeyError as error:
        raise SettingsError(
            f"Secret '{PROXY_SECRET}' has no {error.args[0]}.",
            hint="Make a token with 'modal workspace proxy-tokens create' and keep it: "
            f"modal secret create {PROXY_SECRET} MODAL_KEY=wk-… MODAL_SECRET=ws-…",
        ) from None


def _write_line(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


try:
    DEPLOYMENT = GatewayDeployment.resolve()
except UsageError as error:
    raise SystemExit(error.to_terminal()) from None

if not modal.is_local():
    log_to_stdout()
    raise_process_limits()  # in the container, and before its checkpoint: it takes 35 ms, which no wake should

KEYS_VOLUME = gateway_volume(DEPLOYMENT.settings.volume_prefix)
BATCHES_VOLUME = batches_volume(DEPLOYMENT.settings.volume_prefix)
VOLUME = usage_volume(DEPLOYMENT.settings.volume_prefix)
IMAGE = light_image(*otel_secret.locks(os.environ))
app = modal.App(DEPLOYMENT.app_name)


@app.function(
    image=with_settings(IMAGE, DEPLOYMENT.settings, {}),
    volumes={**VOLUME, **KEYS_VOLUME, **BATCHES_VOLUME},
    secrets=[
        *(modal.Secret.from_name(name, required_keys=required) for name, required in DEPLOYMENT.secrets.items()),
        *otel_secret.secrets(os.environ),
    ],
    **DEPLOYMENT.function_options(),
)
@modal.concurrent(max_inputs=MAX_INPUTS)
@modal.asgi_app()
def serve() -> Gateway:
    """Return the gateway as an ASGI application."""
    return create_modal_app(DEPLOYMENT.settings, DEPLOYMENT.registry, os.environ)


@app.function(
    image=with_settings(IMAGE.apt_install("tzdata"), DEPLOYMENT.settings, {}),
    schedule=modal.Cron(warm.CRON),
    cpu=warm.CPU,
    memory=warm.MEMORY_MB,
    timeout=2 * warm.PERIOD_S,
)
def keep_warm(once: bool = False) -> dict[str, str | dict[str, str]]:
    """Bring the pools that have a schedule of `vllm-service warm` to what it says; return why some are not."""
    prefix = DEPLOYMENT.settings.volume_prefix
    return warm.keep(prefix, partial(spend_limits.why_not, DEPLOYMENT), once=once)


@app.function(
    image=with_settings(IMAGE, DEPLOYMENT.settings, {}),
    volumes={**BATCHES_VOLUME},
    cpu=batch_watch.CPU,
    memory=batch_watch.MEMORY_MB,
    timeout=batch_watch.TIMEOUT_S,
    retries=modal.Retries(max_retries=batch_watch.RETRIES, initial_delay=1.0, backoff_coefficient=2.0),
)
def watch_batch(owner: str, identity: str, name: str) -> str:
    """Keep the gateway up until a batch has ended; return its status."""
    url = serve.get_web_url()
    if url is None:
        raise RuntimeError("The gateway has no URL.")
    store, reload = Store(batches_directory(DEPLOYMENT.app_name)), BATCHES_VOLUME[BATCHES].reload
    return batch_watch.watch(store, owner, identity, name, url, reload=reload)
