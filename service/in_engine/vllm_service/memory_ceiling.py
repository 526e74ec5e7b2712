"""How much memory the engine's processes may take, so that the machine survives what they are asked for.

A limit of the kernel on a process's data, RLIMIT_DATA: what Python and its libraries allocate counts; mapped files and
address space that is only reserved do not, unlike with RLIMIT_AS. In the API server an allocation beyond it fails
within the one request (`MemoryError`: 502, or the end of its connection), or ends this process with a line in its log
that says so. In the engine core, which has weights and KV cache before it is limited, it ends the core: its requests
are 502 `engine_lost`, and another engine takes its place. Nobody else is killed.

Where memory runs out all the same, the kernel kills an engine and not the service: `oom_score_adj` of its processes.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import sys
from pathlib import Path
from typing import Any

_PROC = Path("/proc")
_OOM_SCORE = 500  # of 1,000: as if half of the machine's memory were this process's


def prefer_as_victim() -> None:
    """Have the kernel kill this process, and those that it forks, before others when memory runs out."""
    with contextlib.suppress(OSError):  # no such file outside of Linux
        own = int((_PROC / "self/oom_score_adj").read_text())
        (_PROC / "self/oom_score_adj").write_text(str(max(own, _OOM_SCORE)))


def limit_growth(growth_bytes: int, process: int | str = "self") -> None:
    """Let a process, by default this one, take so many bytes more than it has now, and no more."""
    with contextlib.suppress(OSError, ValueError):  # no such file outside of Linux; a lower limit of somebody else's
        found = re.search(r"^VmData:\s+([1-9]\d*) kB", (_PROC / str(process) / "status").read_text(), re.MULTILINE)
        if found:  # some sandboxes do not count it
            pid = os.getpid() if process == "self" else int(process)
            _, hard = resource.prlimit(pid, resource.RLIMIT_DATA)
            resource.prlimit(pid, resource.RLIMIT_DATA, (int(found[1]) * 1024 + growth_bytes, hard))


def limit_children(growth_bytes: int) -> None:
    """Let each descendant of this process take so many bytes more: the engine core, and its workers if it has any."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        limit_growth(growth_bytes, child.pid)


def close_at_bodies_that_do_not_fit() -> None:
    """End the connection of a body for which uvicorn has no memory; it would answer that the request is no HTTP."""
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    refuse = HttpToolsProtocol.send_400_response

    def send_400_response(self: Any, message: str) -> None:
        error = sys.exception()  # what httptools made of its callback's
        if isinstance(error and error.__context__, MemoryError):
            self.transport.abort()
        else:
            refuse(self, message)

    HttpToolsProtocol.send_400_response = send_400_response  # type: ignore[method-assign]
