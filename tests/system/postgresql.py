"""A PostgreSQL server of a test's own, by Debian's package."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from tempfile import mkdtemp
from typing import Self

from tests.engine.running import free_port

from . import programs

_SERVER = "postgres"  # the user that Debian's package makes: root may not run a server


class Postgresql:
    """A server on loopback with one empty database, from the beginning to the end of a block."""

    def __init__(self) -> None:
        programs.find("pg_lsclusters")
        self._programs = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
        self._port = free_port()
        self._user = _SERVER if os.getuid() == 0 else None

    @property
    def url(self) -> str:
        """The URL of its database."""
        return f"postgresql://{_SERVER}@127.0.0.1:{self._port}/postgres"

    def __enter__(self) -> Self:
        """Make the server and start it."""
        self._directory = Path(mkdtemp(prefix="postgresql-"))
        if self._user:
            shutil.chown(self._directory, self._user)
        self._run("initdb", "--auth", "trust", "--username", _SERVER, "--no-sync", "-D", self._data)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it and remove its files."""
        self.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        options = f"-p {self._port} -k {self._directory} -c listen_addresses=127.0.0.1 -c fsync=off"
        self._run("pg_ctl", "-D", self._data, "-o", options, "-l", str(self._directory / "log"), "-w", "start")

    def stop(self) -> None:
        """End it at once, as a crash does."""
        self._run("pg_ctl", "-D", self._data, "-m", "immediate", "-w", "stop", check=False)

    @property
    def _data(self) -> str:
        return str(self._directory / "data")

    def _run(self, program: str, *arguments: str, check: bool = True) -> None:
        command = [str(self._programs / program), *arguments]
        subprocess.run(
            command, user=self._user, cwd=self._directory, check=check, stdout=subprocess.DEVNULL, timeout=60
        )
