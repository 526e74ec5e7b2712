"""Services as other programs start them: in a terminal, as the first process of a container."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import subprocess
import termios
import threading
from typing import Any, Self

import psutil

from tests.engine.running import Service, wait_until

from . import programs

_STARTS_S = 10


class InTerminal(Service):
    """A service in the foreground of a terminal of its own, whose text is kept as its output."""

    def __enter__(self) -> Self:
        """Open the terminal and start the service in it."""
        self._master, self._slave = pty.openpty()
        self._closing = threading.Event()
        self._screen = threading.Thread(target=self._keep_text)
        self._screen.start()
        try:
            return super().__enter__()
        finally:
            os.close(self._slave)

    def __exit__(self, *exception: object) -> None:
        """Close the terminal, if it is open, and leave nothing running."""
        self.close_terminal()
        super().__exit__(*exception)

    @property
    def err(self) -> str:
        """What the terminal has shown."""
        return self.out

    def close_terminal(self) -> None:
        """Close the terminal: the kernel sends SIGHUP to its foreground, and every further write fails."""
        if not self._closing.is_set():
            self._closing.set()
            self._screen.join()
            os.close(self._master)

    def type(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self._master, keys)

    def _spawn(self, **_: Any) -> subprocess.Popen[bytes]:
        def take_terminal() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        return super()._spawn(
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            start_new_session=True,
            preexec_fn=take_terminal,
        )

    def _keep_text(self) -> None:
        while not self._closing.is_set():
            if select.select([self._master], [], [], 0.02)[0]:
                with contextlib.suppress(OSError), self._out.open("ab") as out:  # EIO: nobody has it open any more
                    out.write(os.read(self._master, 65536))


class FirstProcess(Service):
    """A service that is the first process of a PID namespace, as in a container without an init process."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        mapped = () if os.getuid() == 0 else ("--user", "--map-root-user")
        prefix = (programs.find("unshare"), *mapped, "--pid", "--fork", "--kill-child", "--mount-proc")
        super().__init__(*arguments, prefix=prefix, **options)
        self._first: psutil.Process | None = None

    @property
    def pid(self) -> int:
        """Process id of the service, outside its namespace."""
        if self._first is None:
            unshare = psutil.Process(self._process.pid)
            wait_until(lambda: bool(unshare.children()), _STARTS_S, self)
            (self._first,) = unshare.children()
        return self._first.pid
