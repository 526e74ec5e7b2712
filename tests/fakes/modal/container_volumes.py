"""Volumes of limited size, which the container's process creates itself: a write beyond the size fails with ENOSPC.

Standard library only, since it runs under the container's interpreter. Each is a tmpfs in the container's own mount
namespace; the plane accesses it through /proc/<pid>/root. Without a limited volume nothing is mounted.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile

_CLONE_NEWNS = 0x20000
_MS_REC_PRIVATE = 0x4000 | 0x40000


def limit(sizes: dict[str, int]) -> None:
    """Mount a tmpfs of the size in bytes over each directory and keep its content. Raises: OSError where forbidden."""
    if not sizes:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.unshare(_CLONE_NEWNS), "unshare of the mount namespace")
    _check(libc.mount(b"none", b"/", None, _MS_REC_PRIVATE, None), "making mounts private")
    for directory, size in sizes.items():
        with tempfile.TemporaryDirectory() as kept:
            shutil.copytree(directory, kept, symlinks=True, dirs_exist_ok=True)
            options = f"size={max(size, 1)},mode=755".encode()
            _check(libc.mount(b"tmpfs", os.fsencode(directory), b"tmpfs", 0, options), f"mount of {directory}")
            shutil.copytree(kept, directory, symlinks=True, dirs_exist_ok=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what} failed: {os.strerror(ctypes.get_errno())}")
