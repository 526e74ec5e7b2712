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
from pathlib import Path
from unittest import mock

from service import keys
from service.gateway import local_server
from service.gateway.clients import load_clients
from service.gateway.local_pool import EngineHandle
from service.gateway.local_scheduler import LocalScheduler
from service.gateway.metrics import Metrics
from service.local import serve as local_serve
from service.ports import bound_port
from service.registry.models import ModelSpec, Registry
from service.settings import Settings

MODEL = "tiny"
ENGINE_KEY = "ENGINE_KEY"


class Upstream:
    """An engine that another process starts and stops."""

    def prepare(self) -> None:
        """Do nothing: there are no weights to fetch."""

    def start(self, digests: Mapping[str, str]) -> None:
        """Do nothing: the engine already runs."""

    def stop(self, grace_s: float | None = None) -> None:
        """Do nothing: its owner stops it."""


def serve(port: int, upstream: int) -> None:
    """Serve until SIGTERM."""
    registry = Registry.load()
    spec = registry.resolve(MODEL).spec
    scheduler = LocalScheduler(_nothing, _never, free_memory=lambda: 0, needs_memory=lambda _: 0, idle_s=86_400)
    scheduler.pool(spec).attach(Upstream(), upstream, os.environ[ENGINE_KEY])
    clients = load_clients(os.environ, keys.digests(os.environ), registry, MODEL)
    with (
        bound_port("127.0.0.1", port) as address,
        local_serve.line_writer(Path(os.devnull)) as access,
    ):
        app = local_server.create_local_app(
            registry, spec, scheduler, clients, Metrics(access), python=sys.executable, settings=Settings.load()
        )
        server = local_server.LocalServer(app, address, scheduler, on_open=_ready, on_drain=lambda: None)
        server.run((signal.SIGTERM,))


def up(engine: int) -> None:
    """Run `vllm-service up tiny` with its engine on this port and with the key of the environment."""
    from service.cli import main as cli_main  # noqa: PLC0415 - the other half of this program is measured for its memory

    known = {"free_port": mock.Mock(return_value=engine), "new_key": mock.Mock(return_value=os.environ.pop(ENGINE_KEY))}
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
    command = commands.add_parser("up")
    command.add_argument("engine", type=int)
    command.add_argument("--core", type=int)
    arguments = parser.parse_args()
    if arguments.command == "port":
        serve(arguments.port, arguments.upstream)
        return
    if arguments.core is not None:
        os.sched_setaffinity(0, {arguments.core})
    up(arguments.engine)


if __name__ == "__main__":
    main()
