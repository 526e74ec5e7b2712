"""Files that several processes share: written whole or not at all."""

from __future__ import annotations

import secrets
from pathlib import Path


def atomic_write(file: Path, data: bytes) -> None:
    """Write a file so that no reader ever sees a part of it; its directory is made where there is none.

    What a killed writer leaves behind matches `.<name>.*.tmp`.

    Raises:
        OSError: It cannot be written; nothing is left behind.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    try:
        part.write_bytes(data)
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
