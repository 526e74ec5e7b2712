"""Our gateway as `vllm-service up` serves it, in front of the stub or of a real engine.

`python -m bench.gateway_server port <port> <engine's port>` runs the same server, key check, request log and local pool
in front of an engine that already runs. `… up <engine's port>` runs the command itself with the tiny model and with the
engine's port and key that the benchmark chose; with `--core` all its processes start on one core.

The environment has the gateway's key as `API_KEY`, the engine's as `ENGINE_KEY`, and for `up` the `SERVICE_PORT`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from service import keys
from service.batch.gateway_batches import GatewayBatches
from service.boots.phases import Phases
from service.gateway import local_server
from service.gateway.clients import ClientRegistry
from service.gateway.key_set import KeySource
from service.gateway.local_pool import EngineHandle
from service.gateway.local_scheduler import LocalScheduler
from service.gateway.metrics import Metrics
from service.local.line_file import line_writer
from service.ports import bound_ports
from service.registry.models import ModelSpec, Registry
from service.settings import Settings
from service.usage.database import open_database
from service.usage.key_records import DatabaseKeys
from service.usage.ledger import Ledger

MODEL = "tiny"
ENGINE_KEY = "ENGINE_KEY"


class Upstream:
    """An engine that another process starts and stops."""

    max_model_len: int | None = None
    phases = Phases()

    def prepare(self) -> None:
        """Do nothing: there are no weights to fetch."""

    def start(self, digests: Mapping[str, str]) -> None:
        """Do nothing: the engine already runs."""

    def stop(self, grace_s: float | None = None) -> None:
        """Do nothing: its owner stops it."""

    def kill(self) -> None:
        """Do nothing: its owner watches it."""

    def load_adapter(self, name: str, directory: Path) -> None:
        """Do nothing: its models file does not change."""

    def unload_adapter(self, name: str) -> None:
        """Do nothing: its models file does not change."""


def serve(port: int, upstream: int, ledger: Path | None = None, stored: Path | None = None) -> None:
    """Serve until SIGTERM, with a ledger, or with keys that operators make, in a file where one is named."""
    registry = Registry.load()
    spec = registry.resolve(MODEL).spec
    scheduler = LocalScheduler(_nothing, _never, free_memory=lambda: 0, needs_memory=lambda _: 0, idle_s=86_400)
    scheduler.pool(spec).attach(Upstream(), upstream, os.environ[ENGINE_KEY])
    store = DatabaseKeys(lambda: open_database(file=stored), stored) if stored else None
    source = KeySource(os.environ, keys.digests(os.environ), store, MODEL)
    clients = ClientRegistry.of(source.load_at_start(registry))
    with (
        bound_ports("127.0.0.1", port) as addresses,
        line_writer(Path(os.devnull)) as access,
    ):
        metrics = Metrics(access, Ledger(lambda: open_database(file=ledger)) if ledger else None)
        app = local_server.create_local_app(
            registry,
            spec,
            scheduler,
            clients,
            metrics,
            settings=Settings.load(),
            source=source if stored else None,
            extension=GatewayBatches(),
        )
        server = local_server.LocalServer(
            app, addresses, scheduler, keep_alive_s=75, on_open=_ready, on_drain=lambda: None
        )
        server.run((signal.SIGTERM,))


def up(engine: int) -> None:
    """Run `vllm-service up tiny` with its engine on this port and with the key of the environment."""
    # The other half of this program is measured for its memory.
    from unittest import mock  # noqa: PLC0415

    from service.cli import main as cli_main  # noqa: PLC0415
    from service.local import serve as local_serve  # noqa: PLC0415

    known: dict[str, Any] = {
        "reserved_port": lambda: nullcontext(engine),
        "new_key": lambda: os.environ.pop(ENGINE_KEY),
    }
    with mock.patch.multiple(local_serve, **known), mock.patch.object(sys, "argv", ["vllm-service", "up", MODEL]):
        cli_main.main()


def _nothing(_: ModelSpec) -> None:
    pass


def _ready() -> None:
    pass


def _never(*_: object) -> EngineHandle:
    raise AssertionError("the only engine already runs")


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    port = commands.add_parser("port")
    port.add_argument("port", type=int)
    port.add_argument("upstream", type=int)
    port.add_argument("--ledger", type=Path)
    port.add_argument("--keys", type=Path)
    command = commands.add_parser("up")
    command.add_argument("engine", type=int)
    command.add_argument("--core", type=int)
    arguments = parser.parse_args()
    if arguments.command == "port":
        serve(arguments.port, arguments.upstream, arguments.ledger, arguments.keys)
        return
    if arguments.core is not None:
        os.sched_setaffinity(0, {arguments.core})
    up(arguments.engine)


if __name__ == "__main__":
    main()
