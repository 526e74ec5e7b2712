"""The process that has imported what it runs in forks, until its input ends.

`python -m tests.preloaded.server SOCKET` runs the commands. `… SOCKET PATH MODULE…` runs other programs, and has
imported these modules; the directory PATH is the last in which it looks for them.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import logging
import os
import runpy
import selectors
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What both commands import but for `service.server` and `service.gateway_app`, which read the settings at their import.
MODULES = (
    *("modal", "modal.cli.entry_point", "modal.config"),
    *("service.cli.main", "service.cli.cloud", "service.cli.deployed", "service.cli.deploy", "service.cli.streams"),
    *("service.modal_app.deploy", "service.modal_app.deployment", "service.modal_app.gateway_deployment"),
    *("service.image", "service.volumes", "service.replica.lifecycle", "service.replica.plan"),
)
_READ_AT_IMPORT = ("huggingface_hub", "service.server", "service.gateway_app")


@dataclass(frozen=True)
class Request:
    """A command or a Python program to run, and its caller's files: 0, 1, 2 and, of a container, 3."""

    command: str
    arguments: list[str]
    environment: dict[str, str]
    directory: str
    files: list[int]

    @property
    def is_container(self) -> bool:
        """Whether it is a program, which leads a session of its own."""
        return self.command.endswith(".py")

    def run(self) -> None:
        """Become the command. Its end is that of this process."""
        for number, file in enumerate(self.files):
            os.dup2(file, number)
            os.close(file)
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.directory)
        unbuffered = bool(self.environment.get("PYTHONUNBUFFERED"))
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - the process's own
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(open(number, "wb", 0 if unbuffered else -1, closefd=False), "utf-8", errors)  # noqa: SIM115
            for number, errors in ((1, "strict"), (2, "backslashreplace"))
        )
        sys.stdout.reconfigure(write_through=unbuffered)
        sys.stderr.reconfigure(line_buffering=True)
        logging.getLogger("modal-client").handlers.clear()
        importlib.reload(sys.modules["modal.config"])  # it reads the environment at its import
        if self.is_container:
            paths = [path for path in self.environment.get("PYTHONPATH", "").split(os.pathsep) if path]
            sys.argv, sys.path[:1] = [self.command, *self.arguments], [str(Path(self.command).parent), *paths]
            runpy.run_path(self.command, run_name="__main__")
            return
        sys.executable = str(Path(self.environment["PRELOADED_SOCKET"]).with_name("python"))
        if self.command == "modal":
            sys.argv, sys.path[0] = ["modal", *self.arguments], self.directory
            runpy.run_module("modal", run_name="__main__", alter_sys=True)
            return
        from service.cli.start import main

        scripts = str(Path(sys.prefix) / "bin")
        sys.argv, sys.path[0] = [f"{scripts}/{self.command}", *self.arguments], scripts
        main()


class Server:
    """Takes requests, starts a fork for each, and says how it ended."""

    def __init__(self, path: Path) -> None:
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        self._callers: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()

    def serve(self) -> Request | None:
        """Serve until the input ends; in a fork, return its request."""
        ended, told = socket.socketpair()
        told.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(told.fileno())
        for waited in (sys.stdin, self._listening, ended):
            self._selector.register(waited, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is sys.stdin:
                    return None
                if key.fileobj is ended:
                    ended.recv(4096)
                    self._report()
                elif key.fileobj is not self._listening:
                    self._abandon(key.data)
                elif request := self._accept():
                    signal.set_wakeup_fd(-1)
                    for number in (signal.SIGCHLD, signal.SIGTERM):
                        signal.signal(number, signal.SIG_DFL)
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                    for opened in (*self._callers.values(), self._listening, ended, told):
                        opened.close()
                    self._selector.close()
                    return request

    def _accept(self) -> Request | None:
        """Start a fork; return its request there, and None here."""
        caller, _ = self._listening.accept()
        header, files, _, _ = socket.recv_fds(caller, 4, 4)
        try:
            size = header + _exactly(caller, 4 - len(header))
            fields: dict[str, Any] = json.loads(_exactly(caller, int.from_bytes(size, "big")))
        except (EOFError, ConnectionError):
            for file in (*files, caller.detach()):
                os.close(file)
            return None
        pid = os.fork()
        if pid == 0:
            request = Request(**fields, files=files)
            if request.is_container:
                os.setsid()  # before its pid is known: by its session it is found
            with caller, contextlib.suppress(ConnectionError):
                caller.sendall(os.getpid().to_bytes(4, "big"))
            return request
        for file in files:
            os.close(file)
        self._callers[pid] = caller
        self._selector.register(caller, selectors.EVENT_READ, pid)
        return None

    def _report(self) -> None:
        """Tell the callers of those that have ended."""
        for pid, caller in list(self._callers.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                del self._callers[pid]
                with caller, contextlib.suppress(KeyError, ConnectionError):  # of a caller that has gone
                    self._selector.unregister(caller)
                    caller.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))

    def _abandon(self, pid: int) -> None:
        """Kill a command whose caller has gone; one that has ended was reported a moment ago."""
        if caller := self._callers.get(pid):
            os.kill(pid, signal.SIGKILL)
            self._selector.unregister(caller)


def _exactly(caller: socket.socket, size: int) -> bytes:
    parts = b""
    while len(parts) < size:
        part = caller.recv(size - len(parts))
        if not part:
            raise EOFError("The caller has gone.")
        parts += part
    return parts


def main() -> None:
    """Import, serve, and in a fork run the command."""
    listening, *others = sys.argv[1:]
    sys.path += [path for path in others[:1] if path]
    for name in others[1:] or MODULES:
        importlib.import_module(name)
    sys.modules.pop("modal._container_entrypoint", None)  # only what it imports: each container runs it as a program
    early = [name for name in _READ_AT_IMPORT if name in sys.modules]
    if early:
        raise SystemExit(f"imported before its environment is known: {early}")
    gc.freeze()
    server = Server(Path(listening))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    if request := server.serve():
        request.run()


if __name__ == "__main__":
    main()
