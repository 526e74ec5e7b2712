"""The image: its pins resolve to exactly what the committed lock says, and contain all that the container imports."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import modal
import pytest
from packaging.markers import Marker, default_environment

from service.engine.environment import PINS
from service.image import PYTHON
from tests.contract.conftest import REPOSITORY, deploy
from tests.fakes.modal import ContainerRuntime, ModalPlane

PLATFORM = "x86_64-manylinux_2_35"  # glibc of the image's base, Ubuntu 22.04
PIN = re.compile(r"^([\w.-]+)==(\S+)(?: ; (.*?))?(?: \\)?$", re.MULTILINE)

# Runs each statement of its input with the modal client last on the path, as in a container; prints what failed, and
# the file of each package.
RUN = """
import json, sys
sys.path.append(sys.argv[1])
failed = {}
for statement in json.load(sys.stdin):
    try:
        exec(statement, {})
    except Exception as error:
        failed[statement] = repr(error)
print(json.dumps([failed, {name: module.__file__ for name, module in sys.modules.items() if "." not in name
                           and getattr(module, "__file__", None)}]))
"""


def pins(text: str) -> dict[str, str]:
    """Return name -> version of the requirements that hold in the image."""
    image = default_environment() | {
        "python_version": PYTHON,
        "python_full_version": f"{PYTHON}.0",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
        "platform_system": "Linux",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }
    held = (found for found in PIN.finditer(text) if not found[3] or Marker(found[3]).evaluate(image))
    return {found[1]: found[2] for found in held}


def test_image_pins_resolve_to_the_committed_lock(tmp_path: Path) -> None:
    """Compiled anew within the lock's versions, nothing is missing from it and nothing in it is superfluous."""
    lock = PINS / "engine-cuda.lock"
    compiled = tmp_path / "compiled.txt"
    target = ["--python-version", PYTHON, "--python-platform", PLATFORM]
    form = ["--no-header", "--no-annotate", "--constraint", str(lock), "-o", str(compiled)]
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", *target, *form, str(PINS / "engine-cuda.in")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("UV_FIND_LINKS")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    found = pins(compiled.read_text())
    assert found == pins(lock.read_text())
    assert found["vllm"] == "0.32.0"
    assert found["torch"] == "2.13.0"


def test_image_has_what_the_container_imports_early_and_late(image_packages: str, client_mount: Path) -> None:
    """Every import of a module that `service.server` leads to, in functions too, works with the image's packages.

    What is not the modal client's own packages comes from the image: the client's dependencies, mounted beside it, are
    no excuse.
    """
    statements = _imports_from("service.server")
    assert {"import aiohttp", "from huggingface_hub import constants, snapshot_download", "import httpx2"} <= statements
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("SERVICE_", "MODAL_", "PYTHON"))}
    done = subprocess.run(
        [image_packages, "-c", RUN, str(client_mount)],
        cwd=REPOSITORY,
        env={**ours, "HF_HUB_OFFLINE": "1"},
        input=json.dumps(sorted(statements)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    failed, files = json.loads(done.stdout)
    assert failed == {}
    imported = {statement.split()[1].partition(".")[0] for statement in statements} - sys.stdlib_module_names
    venv = str(Path(image_packages).parents[1])
    outside = {name for name in imported if not files[name].startswith(venv)}
    assert outside - {"modal_proto"} == {"service", "modal"}  # the client's distribution has modal_proto too


def test_container_with_only_the_images_packages_imports_the_service(
    tmp_path: Path, client_mount: Path, image_packages: str
) -> None:
    """A replica with the image's packages but no vLLM boots up to the engine's start, which is what fails."""
    with ModalPlane(tmp_path, container=ContainerRuntime(python=image_packages, client_path=client_mount)) as plane:
        deploy(plane, SERVICE_MODEL="tiny")
        pool = modal.Cls.from_name("vllm-l4", "Server", client=plane.client())(model="tiny")
        with pytest.raises(Exception, match="No module named 'torch'"):
            pool.complete.remote("/health")


def _imports_from(entry: str) -> set[str]:
    """Return the import of a module of this repository, with all imports that it and what it leads to contain.

    PostgreSQL's is left out: SERVICE_DATABASE_URL is set for the gateway alone, whose image has its client.
    """
    statements = {f"import {entry}"}
    modules, pending = set[str](), {entry}
    while pending:
        module = pending.pop()
        modules.add(module)
        for node in _imports(ast.parse(_source(module).read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "service.usage.postgresql":
                continue
            if isinstance(node, ast.ImportFrom) and node.level:  # of a package that an engine imports by another name
                package = module.rsplit(".", node.level)[0]
                node = ast.ImportFrom(".".join(filter(None, (package, node.module))), node.names, 0)  # noqa: PLW2901
            statements.add(ast.unparse(node))
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module), *(f"{node.module}.{name}" for name in names)]
            pending |= {name for name in names if name.startswith("service") and _source(name).exists()} - modules
    return statements - {"from __future__ import annotations"}


def _imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Find the imports that run sooner or later: all but those for the type checker."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from _imports(node)


def _source(module: str) -> Path:
    path = REPOSITORY / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
