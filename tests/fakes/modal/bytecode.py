"""Compiled Python beside the files of a mount: a container would compile all of them again, half a second each time.

Checked by the hash of its source, so that it is of this content wherever the file lies, and never of another.
"""

from __future__ import annotations

import functools
import importlib.util
import py_compile
import tempfile
from pathlib import Path


def lay_beside(path: Path, content: bytes) -> None:
    """Write the bytecode of a file where an interpreter of this version looks for it; none where it is no Python."""
    if compiled := _compiled(content):
        cache = Path(importlib.util.cache_from_source(str(path)))
        cache.parent.mkdir(exist_ok=True)
        cache.write_bytes(compiled)


@functools.cache
def _compiled(content: bytes) -> bytes | None:
    with tempfile.TemporaryDirectory() as directory:
        source, cache = Path(directory, "source.py"), Path(directory, "source.pyc")
        source.write_bytes(content)
        try:
            mode = py_compile.PycInvalidationMode.CHECKED_HASH
            py_compile.compile(str(source), str(cache), doraise=True, invalidation_mode=mode)
        except py_compile.PyCompileError:
            return None
        return cache.read_bytes()
