"""The service on this machine: the gateway, and engines behind it, in the foreground, until Ctrl-C.

Without keys it listens on loopback only and refuses any other host.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from service import keys
from service.boots import records
from service.errors import EngineError, UnauthenticatedBindError
from service.gateway import local_server
from service.gateway.clients import ClientRegistry, load_clients
from service.gateway.local_pool import new_key
from service.gateway.local_scheduler import LocalScheduler
from service.gateway.metrics import Metrics
from service.in_engine.vllm_service.events import Event
from service.local.planner import LocalPlanner, ProgressReporter
from service.ports import bound_port, claim_port, free_port, is_loopback
from service.registry.models import ModelSpec
from service.replica.lifecycle import Replica
from service.settings import Settings

_log = logging.getLogger(__name__)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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

    The gateway takes requests when the named model is ready, and the death of that model's engine ends the service.
    Every other model of the registry starts with its first request.

    Raises:
        ServiceError: A check failed before the engine was started, or the engine died.
        KeyboardInterrupt: The signal came before it was ready.
    """
    digests = keys.digests(environ)
    _check_host(host, has_keys=bool(digests))
    with _signals_interrupt(), bound_port(host, settings.port) as address, claim_port(settings.port):
        planner = LocalPlanner(settings, reporter, environ)
        spec = planner.resolve(model)
        run = _Run(planner, spec, load_clients(environ, digests, planner.registry, spec.key))
        base_url = _base_url(host, settings.port)
        run.serve(address, lambda seconds: on_ready(Ready(spec, base_url, seconds, needs_key=bool(digests))))


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

    def __init__(self, planner: LocalPlanner, spec: ModelSpec, clients: ClientRegistry) -> None:
        self._planner, self._spec, self._clients = planner, spec, clients
        self._death: EngineError | None = None
        self._server: local_server.LocalServer | None = None

    def serve(self, address: socket.socket, on_open: Callable[[float], None]) -> None:
        """Boot the engine, open the gateway, and stay until the end."""
        planner, reporter = self._planner, self._planner.reporter
        port, key = free_port(), new_key()
        gpus = tuple(range(planner.n_gpu(self._spec))) if planner.gpus else ()
        plan = planner.plan(self._spec, port, gpus)
        replica = Replica(plan, on_event=reporter.phase, on_death=self._engine_died)
        try:
            reporter.phase(Event.WEIGHTS)
            replica.prepare()
            reporter.phase(Event.SPAWNED)
            replica.start({keys.digest(key.encode()): "gateway"})
            with line_writer(access_file(planner.settings.port)) as access:
                metrics = Metrics(access)
                scheduler = planner.scheduler(metrics.count_wake)
                scheduler.pool(self._spec).attach(replica, port, key, gpus)
                self._listen(scheduler, metrics, address, plan.python, lambda: on_open(replica.ready_after_s or 0.0))
        finally:
            replica.stop(0)
        if self._death:
            raise self._death

    def _listen(
        self,
        scheduler: LocalScheduler,
        metrics: Metrics,
        address: socket.socket,
        python: str,
        on_open: Callable[[], None],
    ) -> None:
        planner = self._planner
        app = local_server.create_local_app(
            planner.registry, self._spec, scheduler, self._clients, metrics, python=python, settings=planner.settings
        )
        self._server = local_server.LocalServer(
            app,
            address,
            scheduler,
            on_open=on_open,
            on_drain=lambda: planner.reporter.phase(Event.DRAINING),
        )
        if not self._death:
            self._server.run(_SIGNALS)

    def _engine_died(self, error: EngineError) -> None:
        self._death = error
        if self._server:
            self._server.end()


def _base_url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def _check_host(host: str, *, has_keys: bool) -> None:
    if not has_keys and not is_loopback(host):
        raise UnauthenticatedBindError(
            f"Without keys this serves on loopback only, and '{host}' is reachable from elsewhere.",
            hint="Set API_KEY=<key> or API_KEYS=name=<key>, or leave --host out.",
        )


@contextmanager
def line_writer(file: Path) -> Iterator[Callable[[str], None]]:
    """Yield a function that writes a line to a file; where the file cannot be written the line is dropped."""
    with contextlib.ExitStack() as stack:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            output = stack.enter_context(file.open("w", buffering=1))
        except OSError:
            yield lambda _: None
            return

        def write(line: str) -> None:
            with contextlib.suppress(OSError):
                output.write(line + "\n")

        yield write


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise KeyboardInterrupt as Ctrl-C does, and restore the handlers at the end."""
    before = {number: signal.signal(number, _interrupt) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
