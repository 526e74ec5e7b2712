"""The compute capabilities that the CUDA code in a shared library was compiled for."""

from __future__ import annotations

import struct
from pathlib import Path

_MAGIC, _HEADER, _ENTRY = b"\x50\xed\x55\xba", struct.Struct("<IHHQ"), struct.Struct("<HHIQ12xI")
_PTX, _MACHINE_CODE = 1, 2


def compiled_for(library: Path) -> set[tuple[int, int]]:
    """Return kind and capability (as in `sm_90`) of each piece of code in a library.

    Source: the layout of NVIDIA's fat binaries, as `cuobjdump --list-elf --list-ptx` shows it.
    """
    data, found, at = library.read_bytes(), set[tuple[int, int]](), 0
    while (at := data.find(_MAGIC, at)) >= 0:
        _, version, header, size = _HEADER.unpack_from(data, at)
        if (version, header) != (1, _HEADER.size) or at + header + size > len(data):
            at += len(_MAGIC)
            continue
        entry, at = at + header, at + header + size
        while entry + _ENTRY.size <= at:
            kind, _, length, code, capability = _ENTRY.unpack_from(data, entry)
            found.add((kind, capability))
            entry += length + code
    return found


def runs_on(code: set[tuple[int, int]], capability: tuple[int, int]) -> bool:
    """Tell whether a GPU has machine code of its generation there, or PTX that its driver compiles."""
    gpu = 10 * capability[0] + capability[1]
    return any(
        of <= gpu and (kind == _PTX or (kind == _MACHINE_CODE and of // 10 == capability[0])) for kind, of in code
    )
