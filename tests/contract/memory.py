"""Another process's memory, as a broken restore would leave it."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+)")


def overwrite(pid: int, known: bytes, other: bytes) -> int:
    """Replace `known` by `other` wherever the process has it in memory of its own; return how often.

    Args:
        pid: A process that is stopped, of this user.
        known: Bytes that are nowhere by chance.
        other: As many bytes.
    """
    found = 0
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            match = _MAPPING.match(line)
            if match is None or not match[3].startswith("rw") or match[3].endswith("s"):
                continue
            begin, end = int(match[1], 16), int(match[2], 16)
            with contextlib.suppress(OSError, ValueError):  # a mapping that cannot be read, such as [vvar]
                memory.seek(begin)
                content = memory.read(end - begin)
                for hit in re.finditer(re.escape(known), content):
                    memory.seek(begin + hit.start())
                    memory.write(other)
                    found += 1
    return found
