"""The engine's environment: built once per set of pins, by one process, or refused in words. Nothing is built here."""

from __future__ import annotations

import logging
import shutil
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from service.engine import built_once, environment
from service.engine.installer import Finished
from service.errors import DiskSpaceError, EnvironmentBuildError, ServiceError, UnsupportedPlatformError
from service.hardware import Hardware, NvidiaGpu

Logged = Callable[[], list[str]]
ERROR = ("error: it failed", "  cause: on purpose")
Usage = namedtuple("Usage", "total used free")


class Installer:
    """A fake uv: creates what `venv` creates, records its arguments, fails on demand; rejects other commands."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.fails_at: str | None = None
        self.no_local_torch = False
        self.torch_on_index = False
        self.before: Callable[[], object] = lambda: None

    def __call__(self, *arguments: str, **_: object) -> Finished:
        """Run one command of uv."""
        self.before()
        self.calls.append(arguments)
        if arguments[0] == "venv":
            python = Path(arguments[-1]) / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.touch()
        else:
            assert arguments[:2] == ("pip", "install"), f"the fake installer does not know {arguments}"
        failed = self.fails_at in arguments or ("--offline" in arguments and self.no_local_torch)
        if "--no-deps" in arguments and not {"--offline", "--require-hashes", "--torch-backend"} & set(arguments):
            failed = not self.torch_on_index
        return Finished(
            int(failed), ("Resolved 1 package", "error: it failed", "  cause: on purpose") if failed else ()
        )

    @property
    def locks(self) -> list[str]:
        """Names of the requirement files that were installed, in order."""
        return [Path(call[call.index("-r") + 1]).name for call in self.calls if "-r" in call]


@pytest.fixture
def installer(monkeypatch: pytest.MonkeyPatch) -> Installer:
    """Put the fake in uv's place, on a machine without a GPU."""
    fake = Installer()
    monkeypatch.setattr(built_once, "run_uv", fake)
    monkeypatch.setattr(environment, "probe", lambda: Hardware((), ()))
    return fake


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Logged:
    """Return a function that returns the messages which were logged."""
    caplog.set_level(logging.INFO, "service")
    return lambda: caplog.messages


@pytest.fixture
def pins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return a copy of the pins that the test may change."""
    copy = tmp_path / "pins"
    shutil.copytree(environment.PINS, copy)
    monkeypatch.setattr(environment, "PINS", copy)
    return copy


def test_env_missing_is_built_once_and_then_reused_silently(installer: Installer, logged: Logged) -> None:
    """Two lines, of the beginning and the end; the second start logs nothing and runs nothing."""
    built = environment.ensure()
    assert len(logged()) == 2
    assert f"vLLM {environment.vllm_version('cpu')} for cpu" in logged()[0]
    assert logged()[1].startswith("The engine's environment is built: ")
    assert built.device == "cpu"
    assert Path(built.python).is_file()

    calls = len(installer.calls)
    assert environment.ensure() == built
    assert (len(installer.calls), len(logged())) == (calls, 2)


def test_env_is_in_the_users_cache(installer: Installer, tmp_path: Path) -> None:
    """`XDG_CACHE_HOME` moves it; the checkout stays clean."""
    assert Path(environment.ensure().python).is_relative_to(tmp_path / "cache" / "vllm-service" / "engines")


def test_env_on_cpu_installs_the_lock_with_hashes_and_then_torch(installer: Installer) -> None:
    """Everything by hash, but torch's CPU build, which comes from pip's directories where those have it."""
    environment.ensure()

    assert installer.locks == ["engine-cpu.lock", "engine-cpu-torch.txt"]
    locked, torch = installer.calls[1], installer.calls[2]
    assert {"--require-hashes", "--no-deps", "--compile-bytecode"} <= set(locked)
    assert "--offline" in torch


def test_env_on_cpu_without_a_local_torch_asks_the_users_index_and_then_pytorchs(installer: Installer) -> None:
    """A mirror may have its CPU builds; elsewhere they are on PyTorch's own index."""
    installer.no_local_torch = True
    environment.ensure()

    assert installer.locks == ["engine-cpu.lock", *["engine-cpu-torch.txt"] * 3]
    assert [call[5] for call in installer.calls[-3:]] == ["--offline", "--no-deps", "--torch-backend"]


def test_env_on_cpu_with_torch_on_the_users_index_is_complete(installer: Installer) -> None:
    """Behind a mirror PyTorch's own index is out of reach."""
    installer.no_local_torch, installer.torch_on_index = True, True
    environment.ensure()

    assert "--torch-backend" not in installer.calls[-1]


def test_env_with_a_gpu_installs_the_cuda_lock_alone(installer: Installer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same lock makes Modal's image."""
    gpu = NvidiaGpu("NVIDIA L4", 23034, "580.95.05", "GPU-1")
    monkeypatch.setattr(environment, "probe", lambda: Hardware((gpu,), ()))

    assert environment.ensure().device == "cuda"
    assert installer.locks == ["engine-cuda.lock"]
    named = installer.calls[-1][installer.calls[-1].index("--constraint") + 1]
    assert "torch===" in Path(named).read_text()  # not a CPU build, which `==` takes too


@pytest.mark.parametrize("changed", ["engine-cpu.lock", "engine-cpu-torch.txt"])
def test_env_of_changed_pins_is_another(installer: Installer, logged: Logged, pins: Path, changed: str) -> None:
    """A new lock never reuses an old environment."""
    first = environment.ensure()
    (pins / changed).write_text((pins / changed).read_text() + "\n# changed\n")

    assert environment.ensure() != first
    assert len([message for message in logged() if message.startswith("Building")]) == 2


def test_env_of_other_pins_is_the_same(installer: Installer, pins: Path) -> None:
    """The light environment's lock and the other device's have no part in it."""
    first = environment.ensure()
    for other in ("light.lock", "engine-cuda.lock"):
        (pins / other).write_text("# changed\n")

    assert environment.ensure() == first


def test_env_of_another_python_is_another(installer: Installer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled wheels fit one version."""
    first = environment.ensure()
    monkeypatch.setattr(sys, "base_prefix", "/another/python")

    assert environment.ensure() != first


@pytest.mark.parametrize("step", ["venv", "--require-hashes", "--torch-backend"])
def test_env_whose_installer_fails_is_an_error_and_no_environment(
    installer: Installer, logged: Logged, step: str
) -> None:
    """Uv's error is logged, ours says which step failed and what to do; the next start begins anew and succeeds."""
    installer.fails_at, installer.no_local_torch = step, True
    with pytest.raises(EnvironmentBuildError, match=r"uv .* failed with code 1 .* run the same command again"):
        environment.ensure()
    assert logged()[1:] == ["\n".join(ERROR)]

    installer.fails_at = None
    assert Path(environment.ensure().python).is_file()
    assert len([message for message in logged() if message.startswith("Building")]) == 2


def test_env_that_was_cut_short_is_built_anew(installer: Installer) -> None:
    """Without its mark a directory is rubbish."""
    python = Path(environment.ensure().python)
    root = python.parents[1]
    (root / ".complete").unlink()
    (root / "rubbish").touch()
    environment.ensure()

    assert not (root / "rubbish").exists()
    assert (root / ".complete").exists()


def test_env_wanted_by_two_is_built_by_one_while_the_other_waits(installer: Installer, logged: Logged) -> None:
    """The second logs one line, waits, and reuses the result."""
    building = threading.Event()
    found: list[environment.EngineEnv] = []
    waits = "Another process is building the engine's environment; waiting for it."

    def build_slowly() -> None:
        building.set()
        deadline = time.monotonic() + 10
        while waits not in logged():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    installer.before = build_slowly
    first = threading.Thread(target=lambda: found.append(environment.ensure()))
    first.start()
    assert building.wait(10)
    second = threading.Thread(target=lambda: found.append(environment.ensure()))
    second.start()
    first.join(10)
    second.join(10)

    assert found[0] == found[1]
    assert len([call for call in installer.calls if call[0] == "venv"]) == 1
    assert [message.split(" ", 1)[0] for message in logged()] == ["Building", "Another", "The"]


def test_env_build_that_was_interrupted_is_started_again(installer: Installer) -> None:
    """Ctrl-C while the installer runs frees the lock; the next start builds from the beginning."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    installer.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        environment.ensure()

    installer.before = lambda: None
    assert Path(environment.ensure().python).is_file()


def test_env_without_room_is_refused_before_anything_is_made(
    installer: Installer, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What, how much, where, and where else: nothing was run."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12, 10**9))
    with pytest.raises(DiskSpaceError, match=r"engine's environment needs 3\.5 GB and .* has 1\.0 GB.*XDG_CACHE_HOME"):
        environment.ensure()

    assert installer.calls == []
    assert logged() == []


def test_env_with_a_cache_that_cannot_be_written_is_refused_in_words(
    installer: Installer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A home directory that is read-only, or no directory at all."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")

    with pytest.raises(ServiceError, match=r"/dev/null.*XDG_CACHE_HOME"):
        environment.ensure()


def test_env_on_an_unsupported_platform_is_refused_first(installer: Installer, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to build."""
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UnsupportedPlatformError):
        environment.ensure()

    assert installer.calls == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_vllm_version_is_one_on_both_sides(device: environment.Device) -> None:
    """What is tested on the CPU is what is deployed."""
    assert environment.vllm_version(device) == environment.vllm_version("cpu")
