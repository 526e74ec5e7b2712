"""Makes ports of the host's loopback, such as that of the fake model hub, reachable inside a container's network.

The container's process opens the listening socket, so that it is in the container's network, and sends it to the plane
over a socket pair. The plane accepts connections and forwards them. It needs no further process in the container.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence

PIECE_BYTES = 65536
Forwarder = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class HostPorts:
    """The forwarded ports of one container: 127.0.0.1:<port> inside is 127.0.0.1:<port> of the host."""

    def __init__(self, ports: Sequence[int]) -> None:
        self._ports = list(ports)
        self._servers: list[asyncio.Server] = []
        self._connections: set[asyncio.Task[None]] = set()
        self._plane_end, self.container_end = socket.socketpair()
        self._plane_end.setblocking(False)

    def follow(self) -> None:
        """Wait for the container's sockets in the background. Call once the process has its end."""
        self.container_end.close()
        asyncio.get_running_loop().add_reader(self._plane_end, self._receive)

    def _receive(self) -> None:
        asyncio.get_running_loop().remove_reader(self._plane_end)
        _, descriptors, _, _ = socket.recv_fds(self._plane_end, 1, len(self._ports))
        self._plane_end.close()
        self._serving = asyncio.ensure_future(self._serve(descriptors))

    async def _serve(self, descriptors: list[int]) -> None:
        for port, descriptor in zip(self._ports, descriptors, strict=False):  # none if the process died
            listening = socket.socket(fileno=descriptor)
            self._servers.append(await asyncio.start_server(self._forwarder_to(port), sock=listening))

    def close(self) -> None:
        for server in self._servers:
            server.close()
        for connection in list(self._connections):  # the host may still send to a container that has ended
            connection.cancel()
        if self._plane_end.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._plane_end)
            self._plane_end.close()

    def _forwarder_to(self, port: int) -> Forwarder:
        async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._connections.add(task)
            try:
                await _forward(reader, writer, port)
            except asyncio.CancelledError:  # the container ended
                return
            finally:
                self._connections.discard(task)
                writer.close()

        return forward


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
    try:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:  # no server listens on the host: the container sees the connection closed
        return
    try:
        async with asyncio.TaskGroup() as both:
            both.create_task(_pipe(reader, far_writer))
            both.create_task(_pipe(far_reader, writer))
    except* OSError:  # one side broke off: the other must neither see a clean end nor wait for ever
        writer.transport.abort()
        far_writer.transport.abort()
    finally:
        far_writer.close()


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(PIECE_BYTES):
        writer.write(piece)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
