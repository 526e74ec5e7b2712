"""A service as systemd runs it, by its unit file: `Systemd` where one can be started here, `Signalled` elsewhere."""

from __future__ import annotations

import configparser
import contextlib
import os
import secrets
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any, Self

import psutil

from tests.engine.running import ONE_THREAD, REPOSITORY, free_port, wait_until

UNIT = "vllm-service.service"
UNIT_FILE = REPOSITORY / "examples" / "systemd" / "user" / UNIT
MANAGER = Path("/lib/systemd/systemd")
_STARTS_S = 20
_TARGETS = ("default", "basic", "shutdown")  # those that a unit needs
# A mount namespace with an empty /run, and this process's own control group as the root of all: as after a boot.
_BOOT = f"""
mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system /run/user && mount --bind "$CGROUP" /sys/fs/cgroup
{MANAGER} --user --unit=default.target --log-target=console
exit
"""  # no exec: as the first process it would be the manager of the system


class Unit:
    """The user's unit file of the examples, in a home directory of its own, with its settings beside it.

    Args:
        home: An empty directory.
        settings: Of the service.
    """

    def __init__(self, home: Path, **settings: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.home, self._errors = home, home / "manager.log"
        (home / "vllm-service").symlink_to(REPOSITORY)
        cache = os.environ.get("XDG_CACHE_HOME", str(Path("~/.cache").expanduser()))
        variables = {"XDG_CACHE_HOME": cache, "SERVICE_PORT": str(self.port), **ONE_THREAD, **settings}
        (home / ".config").mkdir()
        (home / ".config" / "vllm-service.env").write_text("".join(f"{key}={variables[key]}\n" for key in variables))

    @property
    def log(self) -> str:
        """What the manager and the service said."""
        return self._errors.read_text()


class Systemd(Unit):
    """A manager of systemd in namespaces of its own, which knows this unit and no other of the machine."""

    @staticmethod
    def can_start() -> bool:
        """Tell whether a manager can be started here: root, systemd's program, and control groups of version 2."""
        return os.getuid() == 0 and MANAGER.exists() and os.access(_control_groups(), os.W_OK)

    def __enter__(self) -> Self:
        """Start the manager, and the unit in it."""
        units = self.home / "units"
        units.mkdir()
        shutil.copy(UNIT_FILE, units)
        for target in _TARGETS:
            (units / f"{target}.target").write_text("[Unit]\nDefaultDependencies=no\n")
        self._group = _control_groups() / f"vllm-service-{secrets.token_hex(4)}"
        self._group.mkdir()
        self._env = {
            "HOME": str(self.home),
            "PATH": os.defpath,
            "CGROUP": str(self._group),
            "XDG_RUNTIME_DIR": "/run/user",
            "SYSTEMD_UNIT_PATH": str(units),
            "SYSTEMD_GENERATOR_PATH": "/nonexistent",
        }
        join = f'echo $$ > "{self._group}/cgroup.procs" && exec "$@"'
        spaces = ["unshare", "--cgroup", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        with self._errors.open("wb") as log:
            self._unshare = subprocess.Popen(
                ["sh", "-c", join, "sh", *spaces, "sh", "-c", _BOOT], env=self._env, stdout=log, stderr=log
            )
        try:
            wait_until(lambda: self._control("is-system-running").stdout.strip() == "running", _STARTS_S)
            assert self._control("start", UNIT).returncode == 0, self.log
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End the manager, with all that it has started, and remove its control groups."""
        self._unshare.kill()
        self._unshare.wait()
        for directory in [*sorted(self._group.rglob("*/"), reverse=True), self._group]:
            wait_until(lambda directory=directory: _removed(directory), _STARTS_S)  # type: ignore[misc]

    def stop(self) -> str:
        """Stop the unit, wait until it has ended, and return how, such as `success`."""
        assert self._control("stop", UNIT).returncode == 0, self.log
        return self._control("show", "--property=Result", "--value", UNIT).stdout.strip()

    def _control(self, *arguments: str) -> Any:
        manager = [child.pid for child in psutil.Process(self._unshare.pid).children()]
        enter = ["nsenter", f"--target={manager[0] if manager else self._unshare.pid}", "--mount", "--pid", "--cgroup"]
        command = [*enter, "systemctl", "--user", *arguments]
        return subprocess.run(command, env=self._env, capture_output=True, text=True, timeout=60, check=False)


class Signalled(Unit):
    """The unit's command, ended as systemd ends it: SIGTERM to every process, and SIGKILL when the time is over."""

    def __enter__(self) -> Self:
        """Start the command."""
        unit = configparser.ConfigParser(interpolation=None, strict=False)
        unit.optionxform = str  # type: ignore[assignment]
        unit.read(UNIT_FILE)
        self._unit = unit["Service"]
        command = shlex.split(self._unit["ExecStart"].replace("%h", str(self.home)))
        lines = (self.home / ".config" / "vllm-service.env").read_text().splitlines()
        env = {"HOME": str(self.home), "PATH": os.defpath} | dict(line.split("=", 1) for line in lines)
        with self._errors.open("wb") as log:
            self._process = subprocess.Popen(command, env=env, cwd=self.home, stdout=log, stderr=log)
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing running."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def stop(self) -> str:
        """Stop the unit, wait until it has ended, and return how, such as `success`."""
        self._signal(signal.SIGTERM)
        try:
            return "success" if self._process.wait(int(self._unit["TimeoutStopSec"])) == 0 else "exit-code"
        except subprocess.TimeoutExpired:
            return "timeout"

    def _signal(self, number: int) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            service = psutil.Process(self._process.pid)
            for process in [service, *service.children(recursive=True)]:
                process.send_signal(number)


def _control_groups() -> Path:
    """Return where the hierarchy of version 2 is mounted."""
    mounts = (line.split() for line in Path("/proc/mounts").read_text().splitlines())
    return next((Path(mount[1]) for mount in mounts if mount[2] == "cgroup2"), Path("/nonexistent"))


def _removed(directory: Path) -> bool:
    """Remove an empty control group; false while a process of it still ends."""
    try:
        directory.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
