"""Helpers of the plane's tests: deploy the sample app, call it, read its events."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import modal
from tests import preloaded

from .modal import ContainerRuntime, ModalPlane

if TYPE_CHECKING:
    from .modal.pools import Pool

SAMPLE = Path(__file__).with_name("sample_app")
REPOSITORY = Path(__file__).parents[2]
ASGI_APP = ("sample-asgi", "web")
BOOT_S = 15.0


def command(plane: ModalPlane, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the real `modal` CLI against the plane."""
    line = [preloaded.python(), "-m", "modal", *arguments]
    merged = os.environ | preloaded.environment() | plane.env | environment
    return subprocess.run(line, cwd=SAMPLE, env=merged, capture_output=True, text=True, timeout=60, check=False)


def deploy(plane: ModalPlane, **environment: str) -> subprocess.CompletedProcess[str]:
    """Deploy the sample; assert that it worked."""
    done = command(plane, "deploy", "-m", "sample.server", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def deploy_asgi(plane: ModalPlane, **environment: str) -> str:
    """Deploy the sample's ASGI application; return its URL."""
    done = command(plane, "deploy", "-m", "sample.asgi", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return plane.url_of(*ASGI_APP)


def get(url: str, headers: dict[str, str] | None = None, data: bytes | None = None) -> tuple[int, bytes]:
    """Send a request; return status and body, whatever the status."""
    request = urllib.request.Request(url, headers=headers or {}, data=data)  # noqa: S310 - a loopback URL
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@contextlib.contextmanager
def connection(url: str) -> Iterator[http.client.HTTPConnection]:
    """Open a connection that returns a response as it arrives and follows no redirect."""
    parts = urlsplit(url)
    with contextlib.closing(http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)) as opened:
        yield opened


def events(plane: ModalPlane, model: str | None = None) -> list[dict[str, Any]]:
    """Return the sample's TRACE lines in order, of all containers or of one model's."""
    tasks = [task for task in plane.tasks if model is None or task.parameters.get("model") == model]
    lines = [line for task in tasks for line in task.log.splitlines() if line.startswith("TRACE ")]
    return [json.loads(line.removeprefix("TRACE ")) for line in lines]


def traced(plane: ModalPlane, name: str) -> list[dict[str, Any]]:
    """Return the events of that name, in order, of all containers."""
    return [event for event in events(plane) if event["event"] == name]


def names(plane: ModalPlane, model: str) -> list[str]:
    """Return the names of a model's events."""
    return [event["event"] for event in events(plane, model)]


@contextlib.contextmanager
def running(directory: Path, runtime: ContainerRuntime) -> Iterator[ModalPlane]:
    """Run a plane with the sample's secret; errors inside the plane fail the test."""
    with ModalPlane(directory, container=runtime) as plane:
        plane.secrets.put("sample-secret", {"TOKEN": "t0"})
        yield plane
        assert plane.failures == []


def pool_of(plane: ModalPlane, model: str) -> Pool:
    """Return the first pool of that model."""
    return next(pool for pool in plane.pools if pool.parameters.get("model") == model)


def live(plane: ModalPlane, model: str) -> list[str]:
    """Return the ids of the model's live containers."""
    return [task.id for task in plane.tasks if task.parameters.get("model") == model and task.is_live]


def long_call(instance: Any) -> modal.FunctionCall[Any]:
    """Spawn a call that lasts until it is cancelled."""
    call: modal.FunctionCall[Any] = instance.complete.spawn("/long", {}, seconds=50.0)
    return call


def server(client: modal.Client) -> Any:
    """Look the deployed class up."""
    return modal.Cls.from_name("sample", "Server", client=client)
