"""The service on this machine: the gateway, and engines behind it, in the foreground, until Ctrl-C.

Without keys it listens on loopback only and refuses any other address.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from service import keys
from service.boots import records
from service.errors import EngineError, OpenDoorError
from service.gateway.clients import Keyring, load_keyring
from service.gateway.local_pool import Machine, new_key
from service.local.planner import Here, Screen
from service.ports import bound_port, claim_port, free_port, is_loopback
from service.registry.models import ModelSpec
from service.replica.lifecycle import Replica
from service.settings import Settings

if TYPE_CHECKING:
    from service.gateway.local_server import Listener
    from service.gateway.metrics import Metrics

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LISTEN = "service.gateway.local_server"  # half a second of imports, which are done while the engine does its own


@dataclass(frozen=True)
class Ready:
    """What is being served, and where."""

    spec: ModelSpec
    base_url: str
    seconds: float
    asks_for_key: bool


def serve(
    model: str | None,
    settings: Settings,
    host: str,
    screen: Screen,
    on_ready: Callable[[Ready], None],
    *,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP, which drain; a second one ends at once. Blocks.

    The model that is named is up before the door opens, and its engine's death ends the service. Every other model of
    the registry starts with its first request.

    Raises:
        ServiceError: Something was refused before the engine began, or the engine died.
        KeyboardInterrupt: The signal came before it was ready.
    """
    digests = keys.digests(environ)
    _check_door(host, bool(digests))
    with _signals_interrupt(), bound_port(host, settings.port) as address, claim_port(settings.port):
        here = Here(settings, screen, environ)
        spec = here.choose(model)
        run = _Run(here, spec, load_keyring(environ, digests, here.registry, spec.key))
        ready = Ready(spec, _base_url(host, settings.port), 0.0, asks_for_key=bool(digests))
        run.serve(address, lambda seconds: on_ready(replace(ready, seconds=seconds)))


def log_file(port: int) -> Path:
    """Return where the engines' output of a run on this port is kept, until the next run."""
    return records.state_directory() / f"engine-{port}.log"


def access_file(port: int) -> Path:
    """Return where a run on this port keeps one JSON line a request, until the next run."""
    return records.state_directory() / f"access-{port}.log"


class _Run:
    """The model that was asked for, and the door in front of it and all others."""

    def __init__(self, here: Here, spec: ModelSpec, keyring: Keyring) -> None:
        self._here, self._spec, self._keyring = here, spec, keyring
        self._death: EngineError | None = None
        self._listener: Listener | None = None

    def serve(self, address: socket.socket, on_open: Callable[[float], None]) -> None:
        """Boot the engine, open the door, and stay until the end."""
        here, screen = self._here, self._here.screen
        port, key = free_port(), new_key()
        gpus = tuple(range(here.n_gpu(self._spec))) if here.gpus else ()
        plan = here.plan(self._spec, port, gpus)
        replica = Replica(plan, say=screen.say, on_line=screen.engine_line, on_event=screen.phase, on_death=self._died)
        try:
            screen.phase("weights")
            replica.prepare()
            screen.phase("spawned")
            threading.Thread(target=import_module, args=(_LISTEN,), name="imports", daemon=True).start()
            replica.start({keys.digest(key.encode()): "gateway"})
            from service.gateway.metrics import Metrics  # noqa: PLC0415 - imported meanwhile, as local_server is

            with _lines(access_file(here.settings.port)) as access:
                metrics = Metrics(access)
                machine = here.machine(metrics.count_wake)
                machine.pool(self._spec).adopt(replica, port, key, gpus)
                self._listen(machine, metrics, address, plan.python, lambda: on_open(replica.ready_after_s or 0.0))
        finally:
            replica.stop(0)
        if self._death:
            raise self._death

    def _listen(
        self, machine: Machine, metrics: Metrics, address: socket.socket, python: str, on_open: Callable[[], None]
    ) -> None:
        from service.gateway import local_server  # noqa: PLC0415 - by now it is imported, while the engine did its own

        here = self._here
        door = local_server.door(
            here.registry, self._spec, machine, self._keyring, metrics, python=python, settings=here.settings
        )
        self._listener = local_server.Listener(
            door,
            address,
            machine,
            on_open=on_open,
            on_drain=lambda: here.screen.phase("draining"),
        )
        if not self._death:
            self._listener.run(_SIGNALS)

    def _died(self, error: EngineError) -> None:
        self._death = error
        if self._listener:
            self._listener.end()


def _base_url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def _check_door(host: str, has_keys: bool) -> None:
    if not has_keys and not is_loopback(host):
        raise OpenDoorError(
            f"Without keys this serves on loopback only, and '{host}' is reachable from elsewhere. "
            "Set API_KEY=<key> or API_KEYS=name=<key>, or leave --host out."
        )


@contextmanager
def _lines(file: Path) -> Iterator[Callable[[str], None]]:
    """Return what writes lines to a file; a full disk keeps nobody from being served."""
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


class _signals_interrupt:  # noqa: N801 - a context manager, used like a function
    """Make SIGTERM and SIGHUP interrupt as Ctrl-C does, and put back what was there."""

    def __enter__(self) -> None:
        self._before = {number: signal.signal(number, _interrupt) for number in _SIGNALS}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
