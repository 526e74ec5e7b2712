"""Runs a Dockerfile without Docker: the machine's own files are its base image, below an overlay."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from . import programs

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class UnknownInstructionError(Exception):
    """The Dockerfile has what this cannot run."""


@dataclass
class Image:
    """What an image says of its containers.

    Attributes:
        base: What FROM names.
        user: Who runs the entry point.
        workdir: Where.
        env: Variables.
        volumes: Directories that outlive a container.
        ports: Exposed.
        healthcheck: Its command.
        entrypoint: The command.
        cmd: Its arguments, unless others are given.
    """

    base: str = ""
    user: str = "root"
    workdir: str = "/"
    env: dict[str, str] = field(default_factory=dict)
    volumes: list[str] = field(default_factory=list)
    ports: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    cmd: list[str] = field(default_factory=list)


def instructions(file: Path) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile, each with its arguments."""
    text = re.sub(r"^\s*#.*\n", "", file.read_text(), flags=re.M).replace("\\\n", " ")
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def ignored(context: Path, name: str) -> bool:
    """Tell whether .dockerignore leaves a file out: the last of its lines that matches decides."""
    left_out = False
    for line in (context / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        parts = name.split("/")
        if line.startswith("**/"):
            matches = any(fnmatch(part, pattern) for part in parts)
        else:
            matches = fnmatch(parts[0], pattern)
        left_out = not line.startswith("!") if matches else left_out
    return left_out


class Container:
    """A root directory made by the steps of a Dockerfile, and its processes.

    Args:
        directory: Empty; on a file system that can hold the upper part of an overlay.
        context: The build's directory.
    """

    def __init__(self, directory: Path, context: Path) -> None:
        self._directory, self._context = directory, context
        for name in ("upper", "work", "root"):
            (directory / name).mkdir()
        self.image = Image()
        self._give_python()

    def build(self, skipped: str) -> list[str]:
        """Run all steps, less the RUN steps that begin with `skipped`; return those."""
        left = []
        for name, rest in instructions(self._context / "Dockerfile"):
            if name == "RUN" and rest.startswith(skipped):
                left.append(rest)
            else:
                self._step(name, rest)
        return left

    def _step(self, name: str, rest: str) -> None:
        image = self.image
        if name == "RUN":
            done = subprocess.run(
                self.command(["/bin/sh", "-c", rest]), env=self.environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"RUN {rest}\n{done.stdout}{done.stderr}"
        elif name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                self._copy(source, target)
        elif name == "WORKDIR":
            image.workdir = rest
            self._upper(rest).mkdir(parents=True, exist_ok=True)
        elif name == "ENV":
            image.env |= dict([rest.split("=", 1)])
        elif name == "HEALTHCHECK":
            image.healthcheck = json.loads(rest.partition(" CMD ")[2])
        elif name in {"ENTRYPOINT", "CMD", "VOLUME"}:
            setattr(image, {"VOLUME": "volumes"}.get(name, name.lower()), json.loads(rest))
        elif name in {"FROM", "USER"}:
            setattr(image, {"FROM": "base"}.get(name, name.lower()), rest)
        elif name == "EXPOSE":
            image.ports.append(rest)
        else:
            raise UnknownInstructionError(f"{name} {rest}")

    def _copy(self, source: str, target: str) -> None:
        """Copy into the upper part, as COPY does: the content of a directory, or a file."""
        origin = self._context / source
        assert origin.exists(), f"COPY {source}: there is no such file"
        into = self._upper(self.image.workdir) / target
        files = [file for file in origin.rglob("*") if file.is_file()] if origin.is_dir() else [origin]
        for file in files:
            if ignored(self._context, str(file.relative_to(self._context))):
                assert origin.is_dir(), f"COPY {source}: .dockerignore leaves it out"
                continue
            to = into / (file.relative_to(origin) if origin.is_dir() else file.name)
            if not origin.is_dir() and not target.endswith("/"):
                to = into
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, to)

    def _upper(self, path: str) -> Path:
        return self._directory / "upper" / path.lstrip("/")

    @property
    def environment(self) -> dict[str, str]:
        """The container's variables, and those that tell pip where packages are."""
        pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        return {"PATH": PATH, "HOME": "/root", **pip, **self.image.env}

    def command(self, words: list[str], volume: tuple[str, Path] | None = None) -> list[str]:
        """Return what runs a command in the container, as its first process.

        Args:
            words: The command.
            volume: A directory of the container, and what lies there, to be read only. With it the command is run as
                the image's user, and with a network of its own, which has a loopback only; else as root, for a build.
        """
        root, user = self._directory / "root", self.image.user
        layers = f"lowerdir=/,upperdir={self._directory}/upper,workdir={self._directory}/work"
        lines = ["set -e", f"mount -t overlay overlay -o {layers} {root}"]
        lines += [f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev", f"mount --rbind /sys {root}/sys"]
        identity = ""
        if volume:
            path, source = volume
            lines += [
                f"chroot {root} install -d -o {user} -g {user} {Path(path).parent} {path}",
                f"mount --bind -o ro {source} {root}{path}",
                f"{programs.find('ip')} link set lo up",
            ]
            identity = f"setpriv --reuid {user} --regid {user} --clear-groups --no-new-privs "
        inner = f"cd {self.image.workdir} && exec {identity}{shlex.join(words)}"
        lines.append(f"exec chroot {root} /bin/sh -c {shlex.quote(inner)}")
        namespaces = ["--mount", "--pid", "--fork", "--kill-child", *(["--net"] if volume else [])]
        return [*as_root(), programs.find("unshare"), *namespaces, "bash", "-c", "\n".join(lines)]

    def _give_python(self) -> None:
        """Make the tests' own Python the base image's, and let every user reach it and the environments made of it."""
        home = Path(sys.base_prefix)
        program = self._upper("/usr/local/bin") / "python3"
        program.parent.mkdir(parents=True)
        program.write_text(f'#!/bin/sh\nexec {home}/bin/python{sys.version_info[0]}.{sys.version_info[1]} "$@"\n')
        program.chmod(0o755)
        for parent in reversed(home.parents):
            if not parent.stat().st_mode & 0o001:
                self._upper(str(parent)).mkdir(mode=0o755)


def as_root() -> list[str]:
    """Return what goes before a command that only root may run."""
    return [] if os.getuid() == 0 else ["sudo", "-n", "--preserve-env"]
