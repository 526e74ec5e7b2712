"""Files that several processes share, written whole or not at all, and the user's directories."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

from service.errors import UsageError


def expand_user(path: str | Path) -> Path:
    """Return a path with the home directory in place of `~`; that of an unknown user stays as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - pathlib's raises for an unknown user


def user_directory(variable: str, default: str) -> Path:
    """Return the directory that a variable such as XDG_CACHE_HOME names; a relative path counts as unset.

    Source: the XDG Base Directory Specification.
    """
    path = Path(os.environ.get(variable, ""))
    return path if path.is_absolute() else expand_user(default)


def require_writable(file: Path, *, is_replaced: bool = False) -> None:
    """Insist that a file that was named can be written, before the work whose result it gets.

    Args:
        file: The file.
        is_replaced: It is read first, or replaced by another, as a device such as /dev/stdout must not be.

    Raises:
        UsageError: Its directory is missing, it is a directory or such a device, or this user may not write it.
    """
    directory, why = file.absolute().parent, ""
    try:
        if not directory.is_dir():
            why = "No such directory"
        elif file.is_dir():
            why = "Is a directory"
        elif is_replaced and is_device(file):
            why = "Is no file but a device or a pipe"
        elif not os.access(file if file.exists() else directory, os.W_OK):
            why = "Permission denied"
    except OSError as error:
        why = str(error.strerror)
    if why:
        raise UsageError(
            f"'{file}' cannot be written: {why}.", hint="Name a file in a directory that exists and you may write to."
        )


def is_device(file: Path) -> bool:
    """Tell whether a path is that of a device or a pipe, wherever the pipe leads."""
    place = file.absolute()
    is_in_dev = place.is_relative_to("/dev") and not place.is_relative_to("/dev/shm")  # noqa: S108 - where it is not
    return is_in_dev or (file.exists() and not (file.is_file() or file.is_dir()))


def atomic_write(file: Path, data: bytes, mode: int | None = None, *, is_synced: bool = False) -> None:
    """Write a file so that no reader ever sees a part of it; its directory is made where there is none.

    What a killed writer leaves behind matches `.<name>.*.tmp`.

    Args:
        file: Replaced where it exists.
        data: All of its content.
        mode: Its permissions, which hold from its first byte; None: those of any new file.
        is_synced: The content is on the disk before it replaces the file, for a loss of power.

    Raises:
        OSError: It cannot be written, or is a device; nothing is left behind.
    """
    if is_device(file):
        raise OSError(errno.EINVAL, "Is no file but a device or a pipe", str(file))
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    try:
        if mode is not None:
            part.touch(mode=0o600)
            part.chmod(mode)
        part.write_bytes(data)
        if is_synced:
            with part.open("rb") as written:
                os.fsync(written.fileno())
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
