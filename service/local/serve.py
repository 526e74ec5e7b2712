"""The service on this machine: the gateway, and engines behind it, in the foreground, until Ctrl-C.

Without keys it listens on loopback only and refuses any other host.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from service import keys
from service.batch.gateway_batches import GatewayBatches
from service.boots import records
from service.errors import EngineError, UnauthenticatedBindError
from service.gateway import local_server, tracing
from service.gateway.clients import ClientRegistry
from service.gateway.key_set import KeySource
from service.gateway.local_pool import new_key
from service.gateway.local_scheduler import LocalScheduler
from service.gateway.metrics import Metrics
from service.gateway.webhook import CrashLoops, Webhook
from service.in_engine.vllm_service.events import Event
from service.local.line_file import line_writer
from service.local.planner import LocalPlanner, ProgressReporter
from service.local.signals import end_signals, signals_interrupt
from service.ports import bound_ports, claim_port, is_loopback, reserved_port
from service.registry.models import ModelSpec
from service.replica.lifecycle import Replica
from service.settings import Settings, database_url
from service.usage.database import database_opener
from service.usage.key_records import KeyStore, database_keys
from service.usage.ledger import KEPT_S, Ledger

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ready:
    """What is being served, and where.

    Attributes:
        seconds: From the start of the boot until the model was ready.
    """

    spec: ModelSpec
    base_url: str
    seconds: float
    needs_key: bool


def serve(
    model: str | None,
    settings: Settings,
    host: str,
    reporter: ProgressReporter,
    on_ready: Callable[[Ready], None],
    *,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP, which drain; a second one ends at once. Blocks.

    A SIGHUP that this process was started to ignore, as nohup does, stays ignored.

    The gateway takes requests when the named model is ready, and the death of that model's engine ends the service.
    Every other model of the registry starts with its first request.

    Raises:
        ServiceError: A check failed before the engine was started, or the engine died.
        KeyboardInterrupt: The signal came before it was ready.
    """
    digests, store = keys.digests(environ), database_keys(database_url(environ))
    if not (digests or is_loopback(host)):
        _check_has_keys(host, store)
    with (
        signals_interrupt(),
        bound_ports(host, settings.port) as addresses,
        claim_port(settings.port),
        reserved_port() as port,
    ):
        ledger = Ledger(database_opener(database_url(environ)), kept_s=KEPT_S)
        planner = LocalPlanner(settings, reporter, environ, ledger)
        spec = planner.resolve(model)
        source = KeySource(environ, digests, store, spec.key)
        run = _Run(planner, spec, source, ledger)
        base_url = _base_url(host, settings.port)
        run.serve(addresses, port, lambda seconds: on_ready(Ready(spec, base_url, seconds, needs_key=run.needs_key)))


def log_file(port: int) -> Path:
    """Return where the engines' output of a run on this port is kept, until the next run."""
    return records.state_directory() / f"engine-{port}.log"


def access_file(port: int) -> Path:
    """Return where a run on this port keeps one JSON line a request, until the next run."""
    return records.state_directory() / f"access-{port}.log"


class _Run:
    """The engine of the named model, and the gateway in front of it and all others.

    It keeps what the thread that sees the engine's death and the gateway's thread both use.
    """

    def __init__(self, planner: LocalPlanner, spec: ModelSpec, source: KeySource, ledger: Ledger) -> None:
        self._planner, self._spec, self._source, self._ledger = planner, spec, source, ledger
        self._clients = ClientRegistry.of(source.load_at_start(planner.registry))
        self._notify = Webhook.from_environ(planner.environ, "vllm-service up")
        self._death: EngineError | None = None
        self._server: local_server.LocalServer | None = None

    @property
    def needs_key(self) -> bool:
        """Whether a request must carry a key."""
        return self._clients.needs_key

    def serve(self, addresses: list[socket.socket], port: int, on_open: Callable[[float], None]) -> None:
        """Boot the engine, open the gateway, and stay until the end."""
        planner, reporter = self._planner, self._planner.reporter
        key = new_key()
        gpus = tuple(range(planner.n_gpu(self._spec))) if planner.gpus else ()
        plan = planner.plan(self._spec, port, gpus)
        replica = Replica(
            plan,
            on_event=reporter.phase,
            on_death=self._engine_died,
            on_usage=planner.usage_recorder(self._spec),
        )
        try:
            reporter.phase(Event.WEIGHTS)
            replica.prepare()
            reporter.phase(Event.SPAWNED)
            replica.start({keys.digest(key.encode()): "gateway"})
            with line_writer(access_file(planner.settings.port)) as access:
                metrics = Metrics(access, self._ledger)
                scheduler = planner.scheduler(CrashLoops(self._notify, metrics.count_wake).count_wake)
                scheduler.pool(self._spec).attach(replica, port, key, gpus)
                self._listen(scheduler, metrics, addresses, lambda: on_open(replica.ready_after_s or 0.0))
        finally:
            replica.stop(0)
        if self._death:
            raise self._death

    def _listen(
        self,
        scheduler: LocalScheduler,
        metrics: Metrics,
        addresses: list[socket.socket],
        on_open: Callable[[], None],
    ) -> None:
        planner = self._planner
        app = local_server.create_local_app(
            planner.registry,
            self._spec,
            scheduler,
            self._clients,
            metrics,
            settings=planner.settings,
            source=self._source,
            load_models=lambda: planner.read_models(self._spec.key),
            on_models=planner.take_models,
            tracing=tracing.from_environ(planner.environ),
            extension=GatewayBatches(),
            record_adapter=planner.adapter_file.add,
        )
        self._server = local_server.LocalServer(
            app,
            addresses,
            scheduler,
            keep_alive_s=planner.settings.keep_alive_s,
            on_open=on_open,
            on_drain=lambda: planner.reporter.phase(Event.DRAINING),
            on_late_request=metrics.count_late_request,
        )
        if not self._death:
            self._server.run(end_signals())

    def _engine_died(self, error: EngineError) -> None:
        self._death = error
        if self._server:
            self._server.end()


def _base_url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def _check_has_keys(host: str, store: KeyStore) -> None:
    if not any(record.keys for record in store.load().values()):
        raise UnauthenticatedBindError(
            f"Without keys this serves on loopback only, and '{host}' is reachable from elsewhere.",
            hint="Set API_KEY=<key> or API_KEYS=name=<key>, make a key (vllm-service keys new), or leave --host out.",
        )
