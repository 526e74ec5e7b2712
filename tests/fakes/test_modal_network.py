"""The network of a container: a namespace of its own, the host's ports that it is given, life without one."""

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
    """A server of the test answers inside the container's network under its own port; others do not."""
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
    """Where no namespace can be made a single container still serves, on the host's loopback."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with running(tmp_path, dataclasses.replace(runtime, isolate_network=False)) as plane:
        deploy(plane, SAMPLE_PORT=str(port))
        assert get(f"{plane.url_of('sample', 'Server', 'serve')}/health")[0] == 200
        assert plane.tasks[0].namespace is None


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_network_of_a_user_without_rights_is_made_by_a_user_namespace() -> None:
    """Nobody gets a network of their own too."""
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
