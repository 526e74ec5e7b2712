"""What a container runs: the real `modal._container_entrypoint`, in a network of its own. `container_main.py SPEC`.

Replaces three parts of Modal's sandbox: the network, the client that Modal mounts into every container (appended to
sys.path, so that it never shadows what the image installs), and the files under /proc/gvisor.
"""

from __future__ import annotations

import ctypes
import json
import runpy
import signal
import socket
import sys
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Prepare the process as Modal's sandbox would, then run the entrypoint."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a container ends with its plane
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # the process that started the plane may have blocked signals
    signal.signal(signal.SIGINT, signal.default_int_handler)
    spec = json.loads(Path(sys.argv[1]).read_text())
    is_isolated, has_eth0 = _isolate() if spec["isolate_network"] else (False, False)
    _limit_volumes(spec["volume_sizes"])
    _open_host_ports(spec["host_ports_fd"], spec["host_ports"] if is_isolated else [])
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]
    if spec["client_path"]:
        sys.path.append(spec["client_path"])
    _stand_in_for_gvisor(spec, has_eth0=has_eth0)
    sys.argv = ["modal._container_entrypoint"]
    runpy.run_module("modal._container_entrypoint", run_name="__main__", alter_sys=True)


def _isolate() -> tuple[bool, bool]:
    import container_network  # type: ignore[import-not-found]  # beside this file, on the path for this moment only

    try:
        container_network.isolate()
    except OSError as error:
        warning = f"No network namespace ({error}): containers share the host's loopback; run one at a time."
        print(warning, file=sys.stderr, flush=True)  # noqa: T201 - a container's output is its log
        return False, False
    return True, container_network.add_eth0()


def _limit_volumes(sizes: dict[str, int]) -> None:
    import container_volumes  # type: ignore[import-not-found]

    try:
        container_volumes.limit(sizes)
    except OSError as error:
        print(f"Volumes are not limited in size here: {error}.", file=sys.stderr, flush=True)  # noqa: T201


def _open_host_ports(channel_fd: int, ports: list[int]) -> None:
    """Listen in the container's network, and send the sockets to the plane, which forwards to the host's ports."""
    listening = []
    for port in ports:
        opened = socket.create_server(("127.0.0.1", port))
        listening.append(opened)
    with socket.socket(fileno=channel_fd) as channel:
        if listening:
            socket.send_fds(channel, [b"p"], [opened.fileno() for opened in listening])
    for opened in listening:
        opened.close()


def _stand_in_for_gvisor(spec: dict[str, Any], *, has_eth0: bool) -> None:
    from modal._runtime import gpu_memory_snapshot, task_lifecycle_manager

    task_lifecycle_manager.SPEC_ENVIRON_PATH = spec["spec_environ_path"]
    gpu_memory_snapshot.RUNTIME_CHECKPOINT_WAIT_PATH = spec["gpu_restore_path"]
    if not has_eth0:
        from modal._runtime import asgi  # slow to import, needed only here

        asgi.get_ip_address = lambda ifname: "127.0.0.1"  # noqa: ARG005 - the name belongs to the signature


if __name__ == "__main__":
    main()
