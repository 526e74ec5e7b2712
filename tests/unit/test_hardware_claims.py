"""The driver's version, and the claim that keeps two starts apart."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from service.errors import PortInUseError, UnsupportedPlatformError
from service.hardware import bound_port, check_driver, claim_port


def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Put an nvidia-smi on PATH whose driver has this version."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n[ \"$1\" = --query-gpu=driver_version ] && echo '{version}' && echo '{version}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.parametrize("version", ["580.95.05", "581.1", "600", "unreadable"])
def test_driver_that_runs_the_engines_cuda_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """580 or newer; what cannot be read is left to CUDA to judge."""
    driver(tmp_path, monkeypatch, version)
    check_driver()


def test_driver_too_old_is_refused_with_both_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before gigabytes are installed: update it, or use the processor."""
    driver(tmp_path, monkeypatch, "570.133.20")
    with pytest.raises(
        UnsupportedPlatformError, match=r"570\.133\.20 is older than 580.*CUDA_VISIBLE_DEVICES= make serve"
    ):
        check_driver()


def test_port_claimed_by_another_start_is_refused(port: int) -> None:
    """A second start is refused while the first is on its way, though nobody listens yet; another port is free."""
    with claim_port(port):
        bound_port("127.0.0.1", port).close()
        with pytest.raises(PortInUseError, match=f"Port {port} is claimed by another vllm-service"), claim_port(port):
            pytest.fail("two claims at once")
        with claim_port(port + 1):
            pass


def test_port_claim_ends_with_its_holder(port: int) -> None:
    """No file is left that a dead holder could leave behind."""
    claim = f"from service.hardware import claim_port; import os; claim_port({port}).__enter__(); os._exit(1)"
    subprocess.run([sys.executable, "-c", claim], check=False)
    with claim_port(port):
        pass
