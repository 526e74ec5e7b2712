"""Where the clients of the tests live: built on demand from their locks, in the user's cache, by one process."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from service.engine import environment
from service.engine.installer import run_uv

HERE = Path(__file__).parent
LOCK = HERE / "clients.lock"
NPM = HERE / "npm"
HASHED = ("--require-hashes", "--no-deps")
_MARK = ".complete"


def bin_directory() -> Path:
    """Return the directory with `python` and `litellm`, LiteLLM's proxy."""
    return _ensure("clients", [LOCK], _build_python) / "bin"


def node_modules() -> Path:
    """Return the directory that scripts for Node find their packages in."""
    return _ensure("clients-npm", [NPM / "package.json", NPM / "package-lock.json"], _build_npm) / "node_modules"


def node() -> str:
    """Return Node's path."""
    return _program("node")


def _ensure(name: str, locks: list[Path], build: Callable[[Path], None]) -> Path:
    """Return a finished directory, keyed by the bytes of its locks; one process builds it and the others wait."""
    digest = hashlib.sha256(f"{sys.version_info[:3]}{sys.base_prefix}".encode())
    for lock in locks:
        digest.update(lock.read_bytes())
    root = environment._cache_home() / "tests" / f"{name}-{digest.hexdigest()[:12]}"
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root.with_suffix(".lock")):
        if not (root / _MARK).exists():
            shutil.rmtree(root, ignore_errors=True)  # an attempt that was cut short
            build(root)
            (root / _MARK).touch()
    return root


def _build_python(root: Path) -> None:
    for arguments in (
        ("venv", "--quiet", "--python", sys.executable, str(root)),
        ("pip", "install", "--python", str(root / "bin" / "python"), "--compile-bytecode", *HASHED, "-r", str(LOCK)),
    ):
        done = run_uv(*arguments)
        assert done.code == 0, f"uv {arguments[0]} failed with {done.code}:\n" + "\n".join(done.error_lines)


def _build_npm(root: Path) -> None:
    root.mkdir()
    for file in ("package.json", "package-lock.json"):
        shutil.copy(NPM / file, root)
    command = [_program("npm"), "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, f"npm ci failed with {done.returncode}:\n{done.stderr}"


def _program(name: str) -> str:
    found = shutil.which(name)
    assert found, f"'{name}' is not in PATH. The tests run OpenAI's client for JavaScript: install Node 20 with npm."
    return found
