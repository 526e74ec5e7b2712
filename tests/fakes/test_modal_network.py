"""The network of a container: its own namespace, forwarded ports of the host, and a container without a namespace."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from .modal import ContainerRuntime
from .sample import deploy, get, running, server


def test_host_port_is_reachable_inside(tmp_path: Path, runtime: ContainerRuntime) -> None:
    """A container reaches a server of the test under its port, and no other port of the host."""
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as host:
        threading.Thread(target=host.serve_forever).start()
        try:
            reaching = dataclasses.replace(runtime, host_ports=(host.server_port,))
            with running(tmp_path, reaching) as plane:
                deploy(plane)
                instance = server(plane.client())(model="reaches")
                assert "Directory listing" in instance.fetch.remote(f"http://127.0.0.1:{host.server_port}/")
                with pytest.raises(Exception, match="Connection refused"):
                    instance.fetch.remote(plane.url)
        finally:
            host.shutdown()


def test_container_without_a_namespace_works_alone(tmp_path: Path, runtime: ContainerRuntime) -> None:
    """Without a namespace a single container still serves, on the host's loopback."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with running(tmp_path, dataclasses.replace(runtime, isolate_network=False)) as plane:
        deploy(plane, SAMPLE_PORT=str(port))
        assert get(f"{plane.url_of('sample', 'Server', 'serve')}/health")[0] == 200
        assert plane.tasks[0].namespace is None


@pytest.mark.skipif(os.getuid() != 0, reason="only root can change its user id")
def test_network_of_an_unprivileged_user_is_created_in_a_user_namespace() -> None:
    """The user `nobody` gets a network namespace too."""
    steps = [
        f"import ctypes, os, sys; sys.path.append({str(Path(__file__).with_name('modal'))!r})",
        "import container_network",
        "os.setuid(65534)",
        "ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)",  # dumpable again, as after the exec of an ordinary user's program
        "container_network.isolate()",
        "print(container_network.add_eth0(), os.getuid())",
    ]
    line = [sys.executable, "-c", "; ".join(steps)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.stdout == "True 0\n", done.stderr
