"""The bills of materials, and the audit of locked packages, as far as it goes without the internet."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PINS = ROOT / "service" / "pins"


@pytest.fixture(scope="module")
def bills() -> dict[str, dict[str, object]]:
    """What `make sbom` has written, by the name of the environment."""
    subprocess.run(["make", "-s", "sbom"], cwd=ROOT, check=True, timeout=300)
    return {file.name.partition(".")[0]: json.loads(file.read_text()) for file in (ROOT / "build/sbom").iterdir()}


def locked(name: str) -> dict[str, str]:
    """Return package and version of every line of an environment's lock, and of the CPU build of torch."""
    lines = (PINS / f"{name}.lock").read_text()
    if (torch := PINS / f"{name}-torch.txt").exists():
        lines += torch.read_text()
    return dict(re.findall(r"^([\w.-]+)(?:\[[^]]*\])?==([^\s;]+)", lines, re.MULTILINE))


def test_sbom_lists_every_locked_package_with_its_hashes(bills: dict[str, dict[str, object]]) -> None:
    """In CycloneDX's format, one for each environment, of this service."""
    assert set(bills) == {"light", "dev", "engine-cpu", "engine-cuda", "locust", "traces"}
    for name, bill in bills.items():
        parts = {part["name"]: part for part in bill["components"]}
        assert (bill["bomFormat"], bill["metadata"]["component"]["name"]) == ("CycloneDX", "vllm-service")
        assert {package: part["version"] for package, part in parts.items()} == locked(name)
        hashed = {package for package, part in parts.items() if "SHA-256" in json.dumps(part)}
        assert set(parts) - hashed <= {"torch"}


def test_audit_without_its_database_fails() -> None:
    """An audit that looked nothing up must not pass."""
    nowhere = os.environ | {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    subprocess.run(["make", "-s", "build/supply-chain"], cwd=ROOT, check=True, timeout=300)
    audited = subprocess.run(
        ["make", "-s", "audit"], cwd=ROOT, env=nowhere, capture_output=True, text=True, timeout=300, check=False
    )

    assert audited.returncode != 0
    assert "No known vulnerabilities found" not in audited.stdout + audited.stderr
