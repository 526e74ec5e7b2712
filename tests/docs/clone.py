"""A clone of the repository, as a commit of all that is in it would be."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.engine.running import REPOSITORY

_MARKS = ("light", "dev")  # of make: what is built


def copy_repository(directory: Path) -> None:
    """Copy what git has or would add, with its times."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (REPOSITORY / name).exists():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, directory / name)


def lay_clone(directory: Path) -> None:
    """Copy the repository; its environment is the tests' own, and is not built again."""
    copy_repository(directory)
    programs = directory / ".venv/bin"
    programs.mkdir(parents=True)
    for member in Path(sys.prefix, "bin").iterdir():
        (programs / member.name).symlink_to(member)
    for member in ("lib", "pyvenv.cfg"):
        (directory / ".venv" / member).symlink_to(Path(sys.prefix, member))
    for mark in _MARKS:
        (directory / ".venv" / mark).touch()
    command = programs / "vllm-service"  # of the clone: `models --pin` writes beside the registry
    script = f"import sys\nsys.path.insert(0, {str(directory)!r})\nfrom service.cli.main import main\nmain()\n"
    command.unlink()
    command.write_text(f"#!{sys.executable}\n{script}")
    command.chmod(0o755)
