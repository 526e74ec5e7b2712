"""The local run: which model it takes, what it refuses before anything is started, and how it ends."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from service import memory
from service.engine import environment
from service.engine.installer import InstallProgress
from service.errors import (
    EngineError,
    GpuCountError,
    HubUnreachableError,
    MemoryTooSmallError,
    PortInUseError,
    ServiceError,
    UnauthenticatedBindError,
    UnknownModelError,
    UsageError,
)
from service.local import planner, serve
from service.registry.models import Registry
from service.settings import Settings
from service.weights import store
from service.weights.huggingface import HuggingFace
from service.weights.reach import Unreachable
from tests.fakes.hub import Hub

REGISTRY = Registry.load()


class Reporter:
    """Keeps the phases that would be shown."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.phase = self.phases.append

    def installing(self, progress: InstallProgress) -> None:
        """Fail: nothing is installed in these tests."""
        pytest.fail(f"{progress} was reported")


@pytest.fixture
def reporter() -> Reporter:
    """Return a reporter that keeps everything."""
    return Reporter()


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Refuse to build an engine's environment; return the list of attempts."""
    attempts: list[str] = []

    def ensure(*_: object, **__: object) -> environment.EngineEnv:
        attempts.append("build")
        raise ServiceError("this would have built the engine's environment")

    monkeypatch.setattr(environment, "ensure", ensure)
    return attempts


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, fake_python: str) -> Iterator[None]:
    """Make the fake engine the environment of this machine; nothing of it is left after the test."""
    monkeypatch.setattr(environment, "ensure", lambda *_, **__: environment.EngineEnv("cpu", fake_python))
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


def hub(monkeypatch: pytest.MonkeyPatch, *, in_reach: bool, cached: bool = False) -> None:
    """Decide what the hub and the cache have."""
    offline = Unreachable("no answer within 3 s", is_offline=True)
    monkeypatch.setattr(HuggingFace, "why_unreachable", lambda _: None if in_reach else offline)
    monkeypatch.setattr(store, "find", lambda _: store.Weights(Path("/cached")) if cached else None)


@pytest.mark.parametrize(
    ("in_reach", "cached", "key", "lines"),
    [(True, False, "qwen3-0.6b", 0), (False, True, "qwen3-0.6b", 0), (False, False, "tiny", 1)],
)
def test_model_unnamed_is_the_default_or_else_the_tiny_one(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    *,
    in_reach: bool,
    cached: bool,
    key: str,
    lines: int,
) -> None:
    """With a hub or a full cache the default; without either the built-in one, which one line says."""
    caplog.set_level(logging.INFO, "service")
    hub(monkeypatch, in_reach=in_reach, cached=cached)

    assert planner.resolve_model(None, REGISTRY).key == key
    assert len(caplog.messages) == lines
    assert all("No model hub is in reach" in line and "'tiny'" in line for line in caplog.messages)
    assert all("https://huggingface.co: no answer within 3 s" in line for line in caplog.messages)


def test_model_unnamed_behind_a_proxy_that_is_set_up_wrongly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in model in its place would hide what is wrong."""
    wrong = Unreachable("the proxy ALL_PROXY=http://proxy:3128 refuses (403 Forbidden)", "Correct ALL_PROXY.")
    monkeypatch.setattr(HuggingFace, "why_unreachable", lambda _: wrong)
    monkeypatch.setattr(store, "find", lambda _: None)

    with pytest.raises(HubUnreachableError, match=r"'qwen3-0\.6b'.*the proxy ALL_PROXY.*'tiny' needs no hub"):
        planner.resolve_model(None, REGISTRY)


@pytest.mark.parametrize(
    ("name", "key"),
    [("qwen3-4b", "qwen3-4b"), ("QWEN/qwen3-8b-fp8", "qwen3-8b"), ("llm", "qwen3-0.6b"), ("qwen3-8b-h200", "qwen3-8b"),
     ("Qwen/Qwen3-8B-FP8-h200", "qwen3-8b"), ("org/new", "new")],
)  # fmt: skip
def test_model_named_is_looked_up_without_asking_the_hub(monkeypatch: pytest.MonkeyPatch, name: str, key: str) -> None:
    """Key, hub id in any case, `llm`, a name with a GPU, and a hub id that is in no registry."""
    monkeypatch.setattr(HuggingFace, "why_unreachable", lambda _: pytest.fail("the hub was asked"))

    assert planner.resolve_model(name, REGISTRY).key == key


def test_model_named_by_a_directory_is_that_directory(tmp_path: Path) -> None:
    """A model of one's own, wherever it lies."""
    (tmp_path / "config.json").write_text("{}")

    assert planner.resolve_model(str(tmp_path), REGISTRY).directory == tmp_path


def test_model_unknown_is_refused_with_the_nearest() -> None:
    """A mistyped key is not taken for a hub id."""
    with pytest.raises(UnknownModelError, match="Did you mean 'qwen3-8b'"):
        planner.resolve_model("qwen3-8", REGISTRY)


def refuse(kind: type[ServiceError], reporter: Reporter, match: str, **options: object) -> None:
    """Serve, and insist that it is refused so."""
    arguments = {"model": "tiny", "settings": Settings(), "host": "127.0.0.1", "environ": {}} | options
    with pytest.raises(kind, match=match):
        serve.serve(**arguments, reporter=reporter, on_ready=lambda _: pytest.fail("it was served"))  # type: ignore[arg-type]
    assert reporter.phases == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org", "", "127.0.0.1.example.org"])
def test_serve_without_keys_is_refused_beyond_loopback(reporter: Reporter, built: list[str], host: str) -> None:
    """The sentence names the address and how to set a key; exit code 2."""
    refuse(UnauthenticatedBindError, reporter, f"'{host}' is reachable from elsewhere.*API_KEY=", host=host)
    assert built == []
    assert UnauthenticatedBindError.exit_code == 2


def test_serve_with_broken_keys_is_refused(reporter: Reporter, built: list[str]) -> None:
    """A key that cannot be read is not the same as none."""
    refuse(UsageError, reporter, "pair 1 is not name=key", environ={"API_KEYS": "t0psecret"})
    assert built == []


def test_serve_on_a_taken_port_is_refused_before_the_engine(reporter: Reporter, built: list[str], port: int) -> None:
    """Named at once, not after the engine was loaded."""
    with socket.create_server(("127.0.0.1", port)):
        refuse(PortInUseError, reporter, f"Port {port}", settings=Settings(port=port))
    assert built == []


def test_more_gpus_than_visible_are_refused_before_anything_is_built(
    reporter: Reporter, built: list[str], monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    """Two gigabytes for nothing is half of a thing done."""
    monkeypatch.setenv("PATH", "/nowhere")

    refuse(GpuCountError, reporter, "n_gpu=2 GPUs and 0 are visible", settings=Settings(n_gpu=2, port=port))
    assert built == []


def test_weights_over_the_memory_are_refused_before_anything_is_built(
    reporter: Reporter, built: list[str], monkeypatch: pytest.MonkeyPatch, port: int, tmp_path: Path
) -> None:
    """On a CPU the weights are in memory."""
    monkeypatch.setenv("PATH", "/nowhere")
    file = tmp_path / "mine.toml"
    file.write_text("[models.huge]\nhub_id = 'org/huge'\nweights_gb = 1_000_000\n")

    refuse(MemoryTooSmallError, reporter, "'huge'", model="huge", settings=Settings(port=port, models_file=str(file)))
    assert built == []


@pytest.mark.usefixtures("cache")
def test_weights_of_unknown_size_over_the_memory_are_refused_before_they_are_fetched(
    reporter: Reporter, built: list[str], hub: Hub, monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    """A hub id that is in no registry: the hub tells the size, and nothing is downloaded."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(memory, "_room", lambda: memory.Room(3, "the control group x is limited to 0.0 GB"))
    monkeypatch.setattr(memory, "_held_by_children", lambda: 0)

    refuse(MemoryTooSmallError, reporter, "'mine'.*control group", model="org/mine", settings=Settings(port=port))
    assert built == []
    assert hub.requests
    assert not [request for request in hub.requests if "/resolve/" in request]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_serve_until_a_signal_drains_and_returns(
    reporter: Reporter, engine: None, port: int, number: signal.Signals
) -> None:
    """After the signal all processes have ended, nothing is raised, and the previous handlers are restored."""
    before = signal.getsignal(number)
    ready: list[serve.Ready] = []

    def on_ready(what: serve.Ready) -> None:
        ready.append(what)
        os.kill(os.getpid(), number)

    serve.serve("tiny", Settings(port=port), "127.0.0.1", reporter, on_ready, environ={})

    assert ready[0].base_url == f"http://127.0.0.1:{port}/v1"
    assert (ready[0].spec.key, ready[0].needs_key) == ("tiny", False)
    assert reporter.phases[-1] == "draining"
    assert signal.getsignal(number) is before


def test_serve_interrupted_before_ready_raises_and_leaves_nothing(reporter: Reporter, engine: None, port: int) -> None:
    """Ctrl-C during the boot, of an engine that hangs there, is an interrupt to the caller."""

    def phase(name: str) -> None:
        reporter.phases.append(name)
        if name == "started":
            os.kill(os.getpid(), signal.SIGINT)

    reporter.phase = phase  # type: ignore[method-assign, assignment]
    hanging = {"VLLM_CPU_FAKE_ENGINE": '{"hang_at": "imported"}'}  # ready before the signal is taken would be a drain
    with pytest.raises(KeyboardInterrupt):
        serve.serve("tiny", Settings(port=port), "127.0.0.1", reporter, lambda _: None, environ=hanging)


def test_serve_whose_engine_dies_raises_the_reason(reporter: Reporter, engine: None, port: int) -> None:
    """`kill -9` of the engine ends the service with its sentence."""

    def on_ready(_: serve.Ready) -> None:
        leader = next(child for child in psutil.Process().children() if "vllm_service.main" in child.cmdline())
        threading.Timer(0.05, leader.kill).start()

    with pytest.raises(EngineError, match="killed by SIGKILL"):
        serve.serve("tiny", Settings(port=port), "127.0.0.1", reporter, on_ready, environ={})


def test_serve_with_keys_passes_their_digests_only(
    reporter: Reporter, engine: None, port: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine's environment, arguments and output never hold the key."""
    caplog.set_level(logging.INFO, "service")
    seen: Callable[[], str] = lambda: "\n".join(caplog.messages)  # noqa: E731

    def on_ready(what: serve.Ready) -> None:
        assert what.needs_key
        leader = next(child for child in psutil.Process().children() if "vllm_service.main" in child.cmdline())
        assert "t0psecret" not in " ".join(leader.cmdline()) + str(leader.environ()) + seen()
        os.kill(os.getpid(), signal.SIGINT)

    environ = dict(os.environ) | {"API_KEY": "t0psecret", "HF_TOKEN": "hf_t0psecret"}
    serve.serve("tiny", Settings(port=port), "0.0.0.0", reporter, on_ready, environ=environ)

    assert '"digests": ["' in seen()


def test_log_file_is_in_the_users_state_by_port(tmp_path: Path) -> None:
    """Two services on two ports do not share a log."""
    assert serve.log_file(8001) == tmp_path / "state" / "vllm-service" / "engine-8001.log"
