"""Run a command in a fork of the server, and end as it ends; another program in the interpreter itself."""

import json
import os
import signal
import socket
import sys

COMMANDS = {("-m", "modal"): 2, ("vllm-service",): 1}
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main():
    """Find out which it is, and run it."""
    arguments, path = sys.argv[1:], os.environ.get("PRELOADED_SOCKET")
    words = next((words for words in COMMANDS if tuple(arguments[: len(words)]) == words), None)
    if words is None or path is None:
        real = os.environ["PRELOADED_PYTHON"]
        os.execv(real, [real, *arguments])  # noqa: S606 - no shell
    forward(path, words[-1], arguments[COMMANDS[words] :])


def forward(path, command, arguments):
    """Have the server run it."""
    directory = os.getcwd()  # noqa: PTH109 - pathlib's import takes longer than all else here
    request = {"command": command, "arguments": arguments, "environment": dict(os.environ), "directory": directory}
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        body = json.dumps(request).encode()
        socket.send_fds(server, [len(body).to_bytes(4, "big")], [0, 1, 2])
        server.sendall(body)
        pid = number_of(server)
        for number in FORWARDED:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda number, _: os.kill(pid, number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        code = number_of(server)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def number_of(server):
    """Read a number of four bytes."""
    read = server.recv(4, socket.MSG_WAITALL)
    if len(read) != 4:
        sys.exit("The server of preloaded commands has ended.")
    return int.from_bytes(read, "big", signed=True)


main()
