"""Asks an engine's port whether it answers, and whether it is that engine that answers."""

from __future__ import annotations

import http.client


def answers_healthy(host: str, port: int, pid: int) -> bool:
    """Ask `/health` once, over a connection of its own.

    Args:
        host: Address that the engine listens on.
        port: Its port, which another process may have taken.
        pid: Process id of the engine's leader, which its guard puts into the answer.
    """
    address = "127.0.0.1" if host in {"0.0.0.0", "::"} else host  # noqa: S104 - compared
    connection = http.client.HTTPConnection(address, port, timeout=5)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        return answer.status == 200 and answer.getheader("x-engine-pid") == str(pid)
    except (OSError, http.client.HTTPException):  # nothing listens there, or something that speaks no HTTP
        return False
    finally:
        connection.close()
