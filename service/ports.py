"""Sockets of this machine: which addresses are loopback, a claim on a port, a bound port, a reserved one."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from service.errors import PortInUseError

_LOOPBACK = {"127.0.0.1", "::1", "localhost"}
_OTHER_LOOPBACK = {"127.0.0.1": "::1", "localhost": "::1", "0.0.0.0": "::1", "::1": "127.0.0.1"}  # noqa: S104 - a key


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach a server that listens on `host`."""
    return host in _LOOPBACK


@contextmanager
def claim_port(port: int) -> Iterator[None]:
    """Keep other starts of this service away from a port while the context lasts.

    vLLM binds at once but listens only when it is built, and until then a second engine could bind as well; then both
    would believe that they serve. The claim is the name of a socket in the kernel: it needs no file and ends with the
    process that holds it.

    Raises:
        PortInUseError: Another start of this service holds the claim.
    """
    with socket.socket(socket.AF_UNIX) as claim:
        try:
            claim.bind(f"\0vllm-service-port-{port}")
        except OSError as error:
            raise PortInUseError(
                f"Port {port} is claimed by another vllm-service that is starting or serving.", hint=_hint(port)
            ) from error
        yield


def bound_port(host: str, port: int) -> socket.socket:
    """Return a socket that is bound and does not listen yet: no other process can take the port in the meantime.

    Raises:
        PortInUseError: The port is taken, or this user may not bind it.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        if error.errno in {errno.EADDRINUSE, errno.EACCES}:
            raise PortInUseError(
                f"Port {port} on {host} cannot be bound: {error.strerror}.", hint=_hint(port)
            ) from error
        raise PortInUseError(
            f"--host {host} is no address of this machine to listen on: {error.strerror}.",
            hint="Give one of this machine's addresses, or leave --host out.",
        ) from error
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)  # else another may bind as well until this one listens
    return bound


@contextmanager
def bound_ports(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Yield a socket of this host, bound and not listening yet, and for loopback one of the other loopback as well.

    `localhost` is ::1 for some clients, such as Node, and 127.0.0.1 for others. A machine without IPv6 has only one.

    Raises:
        PortInUseError: The port is taken on one of them, or this user may not bind it.
    """
    with ExitStack() as stack:
        hosts = [host]
        if (other := _OTHER_LOOPBACK.get(host)) and _exists(other):
            hosts.append(other)
        yield [stack.enter_context(bound_port(host, port)) for host in hosts]


def _exists(host: str) -> bool:
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True


@contextmanager
def reserved_port() -> Iterator[int]:
    """Yield a free port of the loopback, which only a server that sets SO_REUSEADDR, as vLLM does, can take meanwhile.

    vLLM binds it seconds later. Without the reservation any connection of this machine may have it by then, as the port
    that the kernel chose for its own end, and vLLM ends with "Address already in use".
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield int(held.getsockname()[1])


def _hint(port: int) -> str:
    other = port + 1 if port < 65535 else 8001
    return f"Stop the process that holds it, or choose another port: make serve SERVICE_PORT={other}."
