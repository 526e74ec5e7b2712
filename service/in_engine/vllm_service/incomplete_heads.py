"""How much memory the incomplete heads of all connections take, at the gateway and at the engine's own server."""

from __future__ import annotations

from typing import Generic, TypeVar

HEADER_BYTES = 144  # of memory that a header takes beside its text: a pair of two byte strings, and its place in a list
SEPARATOR_BYTES = 3  # of a header, at least: a colon and the end of the line
_UNCOUNTED = 1024  # bytes: less than what a connection itself takes

Connection = TypeVar("Connection")


class IncompleteHeads(Generic[Connection]):
    """What the incomplete heads of all connections take; the small ones are not counted.

    A head that is sent in several pieces is complete within milliseconds. So where all take too much, those that have
    been incomplete longest have to end.

    Args:
        most: Bytes that they may take.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: dict[Connection, int] = {}  # the oldest is the first
        self._all = 0

    def hold(self, connection: Connection, size: int) -> list[Connection]:
        """Count what a connection's takes now; return those whose heads have to end, which count no more."""
        if size <= _UNCOUNTED:
            self.release(connection)
            return []
        self._all += size - self._held.get(connection, 0)
        self._held[connection] = size
        ending = []
        while self._all > self._most:
            ending.append(oldest := next(iter(self._held)))
            self.release(oldest)
        return ending

    def release(self, connection: Connection) -> None:
        """Note that a connection has no incomplete head."""
        if self._held:
            self._all -= self._held.pop(connection, 0)
