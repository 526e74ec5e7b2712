"""What lies in the working directory is neither imported nor read: it may be a model's repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.engine.args import ENTRY, engine_command
from service.engine.installer import run_uv
from service.engine.pip_settings import uv_settings
from service.registry.models import Registry
from service.weights.download_process import download_in_child
from service.weights.files import RepositorySpec
from tests.fakes.hub import Hub
from tests.unit.hub_client import COMMIT

SHADOWED = ("pip", "uv", "msgspec", "vllm", "vllm_service", "service", "huggingface_hub", "pydantic")


@pytest.fixture
def traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the working directory one whose modules leave a trace when they are imported."""
    directory, traces = tmp_path / "repository", tmp_path / "traces"
    for path in (directory, traces):
        path.mkdir()
    for name in SHADOWED:
        (directory / f"{name}.py").write_text(f"open({str(traces / name)!r}, 'w').close()\n")
    monkeypatch.chdir(directory)
    return traces


def test_working_directory_is_not_imported_by_the_engine(traces: Path) -> None:
    """Its main module refuses to run without its parent, after its own imports."""
    command = engine_command(Registry.load().specs["tiny"], Path("/weights"), parent_env=os.environ)
    ended = subprocess.run(
        [sys.executable, "-m", ENTRY], env=dict(command.env), capture_output=True, text=True, check=False
    )

    assert "is started by the service" in ended.stderr
    assert not list(traces.iterdir())


@pytest.mark.usefixtures("cache")
def test_working_directory_is_not_imported_by_a_download(traces: Path, hub: Hub) -> None:
    """It fetches what it should."""
    assert download_in_child(RepositorySpec("org/mine", COMMIT)).is_dir()
    assert not list(traces.iterdir())


def test_working_directory_is_not_imported_by_the_installer(traces: Path) -> None:
    """Neither by pip, whose settings are read, nor by uv."""
    uv_settings()

    assert run_uv("--version").code == 0
    assert not list(traces.iterdir())


def test_working_directory_does_not_say_where_packages_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged uv.toml there would end uv."""
    monkeypatch.chdir(tmp_path)
    Path("uv.toml").write_text("this is no TOML\n")

    assert run_uv("pip", "list").code == 0


def test_every_python_is_started_without_the_working_directory() -> None:
    """Each `python -m` of the service has `-P`, but for the one that runs in the service's own directory."""
    service = Path(__file__).parents[2] / "service"
    unsafe = [path for path in service.rglob("*.py") if 'sys.executable, "-m"' in path.read_text()]

    assert [path.name for path in unsafe] == ["publish.py"]
    assert "cwd=ROOT" in unsafe[0].read_text()
