"""Ports and addresses: what is loopback, what is taken, and the claim that keeps two starts apart."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from service.errors import PortInUseError
from service.ports import bound_port, bound_ports, claim_port, is_loopback, reserved_port


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *(("127.0.0.1", True), ("::1", True), ("localhost", True)),
        *(("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("", False)),
    ],
)
def test_loopback_is_what_only_this_machine_reaches(host: str, expected: bool) -> None:
    """What is not known to be loopback is not."""
    assert is_loopback(host) is expected


def test_port_that_is_free_is_accepted(port: int) -> None:
    """And it is free afterwards."""
    bound_port("127.0.0.1", port).close()
    bound_port("0.0.0.0", port).close()


@pytest.mark.parametrize("taken_on", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("wanted_on", ["127.0.0.1", "0.0.0.0"])
def test_port_in_use_is_refused_with_another(port: int, taken_on: str, wanted_on: str) -> None:
    """Whichever of the two listens on every address."""
    with (
        socket.create_server((taken_on, port)),
        pytest.raises(PortInUseError, match=rf"Port {port} on .*in use.*SERVICE_PORT={port + 1}\."),
    ):
        bound_port(wanted_on, port).close()


def test_port_that_was_just_closed_is_accepted(port: int) -> None:
    """Connections of the last run that linger are no listener."""
    with socket.create_server(("127.0.0.1", port)) as server, socket.create_connection(("127.0.0.1", port)) as client:
        accepted, _ = server.accept()
        accepted.close()
        assert client.recv(1) == b""

    bound_port("127.0.0.1", port).close()


def test_port_on_an_address_that_is_not_ours_is_refused(port: int) -> None:
    """The reason is the system's own."""
    with pytest.raises(PortInUseError, match=r"192\.0\.2\.1"):
        bound_port("192.0.2.1", port).close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "0.0.0.0"])
def test_port_of_loopback_is_bound_on_both(host: str, port: int) -> None:
    """`localhost` is ::1 for Node and 127.0.0.1 for others."""
    with bound_ports(host, port) as bound:
        for one in bound:
            one.listen()
        for address in ("127.0.0.1", "::1"):
            socket.create_connection((address, port), 1).close()


def test_port_taken_on_the_other_loopback_is_refused(port: int) -> None:
    """Else some clients of `localhost` would reach another program."""
    with (
        socket.create_server(("::1", port), family=socket.AF_INET6),
        pytest.raises(PortInUseError, match=f"Port {port} on ::1 "),
        bound_ports("127.0.0.1", port),
    ):
        pytest.fail("it was bound")


def test_port_on_a_machine_without_ipv6_is_bound_on_ipv4_alone(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no ::1."""
    monkeypatch.setattr("service.ports._exists", lambda _: False)
    with bound_ports("127.0.0.1", port) as bound:
        assert len(bound) == 1


def test_port_claimed_by_another_start_is_refused(port: int) -> None:
    """A second start is refused while the first is on its way, though nobody listens yet; another port is free."""
    with claim_port(port):
        bound_port("127.0.0.1", port).close()
        with pytest.raises(PortInUseError, match=f"Port {port} is claimed by another vllm-service"), claim_port(port):
            pytest.fail("two claims at once")
        with claim_port(port + 1):
            pass


def test_port_claim_ends_with_its_holder(port: int) -> None:
    """No file is left that a dead holder could leave behind."""
    claim = f"from service.ports import claim_port; import os; claim_port({port}).__enter__(); os._exit(1)"
    subprocess.run([sys.executable, "-c", claim], check=False)
    with claim_port(port):
        pass


def test_reserved_port_is_left_to_an_engine_alone() -> None:
    """VLLM binds it with SO_REUSEADDR and listens; no connection of this machine has it as its own port meanwhile."""
    with reserved_port() as port, socket.create_server(("127.0.0.1", 0)) as other, socket.socket() as connection:
        with pytest.raises(OSError, match="in use"):
            connection.bind(("127.0.0.1", port))
        with socket.socket() as engine:
            engine.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            engine.bind(("127.0.0.1", port))
            engine.listen()
            socket.create_connection(("127.0.0.1", port), 1).close()
        taken = {socket.create_connection(other.getsockname()) for _ in range(50)}
        assert port not in {each.getsockname()[1] for each in taken}
        for each in taken:
            each.close()
