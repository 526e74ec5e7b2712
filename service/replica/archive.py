"""Packs the files of a directory into one tar, so that a network volume has one file and not thousands.

An archive is named by the digest of its bytes, holds regular files only, and is refused whole when it is anything else.
Files are written under a temporary name and renamed: no reader ever sees half of one.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import stat
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from decimal import Decimal
from fnmatch import fnmatchcase
from itertools import accumulate
from pathlib import Path

Stamp = tuple[int, int]
"""A file's size, and its mtime in ns."""

_SETTLED_S = 1.0  # linkers write in place (g++ for inductor on a CPU, ninja's): a file this fresh may be half of one
_MAX_ARCHIVES, _MAX_BYTES = 16, 4 * 1024**3  # of a directory, of what is loaded at once; beyond it the oldest go
_ABANDONED_S = 3600


class DamagedArchiveError(Exception):
    """The content does not match the name, or is not what `write` writes."""


def files(directory: Path, but: Iterable[str] = ()) -> dict[str, Stamp]:
    """Return the regular files below a directory by their relative paths, less those that change at this moment.

    Args:
        directory: It may be missing.
        but: Patterns of names of files and directories to pass over.
    """
    found: dict[str, Stamp] = {}
    now = time.time()
    for parent, directories, names in os.walk(directory):
        directories[:] = [name for name in directories if not _matches(name, but)]
        for path in (Path(parent, name) for name in names if not _matches(name, but)):
            with suppress(OSError):  # removed meanwhile
                status = path.lstat()
                if stat.S_ISREG(status.st_mode) and abs(now - status.st_mtime) >= _SETTLED_S:
                    found[str(path.relative_to(directory))] = (status.st_size, status.st_mtime_ns)
    return found


def write(archive_dir: Path, directory: Path, chosen: dict[str, Stamp]) -> tuple[Path, dict[str, Stamp]] | None:
    """Put files of a directory into an archive; return its path and what is in it, None for nothing.

    A file that vanishes or changes while it is read is left out.

    Raises:
        OSError: `archive_dir` cannot be written to; nothing is left of the attempt.
    """
    archive_dir.mkdir(parents=True, exist_ok=True)
    with _temporary(archive_dir) as new:
        with new.open("w+b") as file:
            with tarfile.open(fileobj=file, mode="w:", format=tarfile.PAX_FORMAT) as tar:
                written = {name: stamp for name, stamp in sorted(chosen.items()) if _add(tar, directory, name, stamp)}
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not written:
            return None
        archive = archive_dir / f"{digest}.tar"
        new.replace(archive)
    return archive, written


def unpack(archive: Path, directory: Path) -> dict[str, Stamp]:
    """Put the files of an archive into a directory, over what is there; return what was in it. No file is left open.

    Raises:
        DamagedArchiveError: It is not as `write` wrote it; the directory is as it was.
        OSError: It cannot be read, or the directory cannot be written to.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory) as copy:
        with archive.open("rb") as file:  # once: it comes over a network
            shutil.copyfileobj(file, copy, 1 << 20)
        copy.seek(0)
        digest = hashlib.file_digest(copy, "sha256").hexdigest()
        if digest != archive.stem:
            raise DamagedArchiveError(f"its digest is {digest[:12]}…")
        copy.seek(0)
        try:
            with tarfile.open(fileobj=copy, mode="r:") as tar:
                members = [(_checked(member, directory), _mtime_ns(member)) for member in tar]
                for member, mtime_ns in members:
                    _place(tar, member, mtime_ns, directory)
        except (tarfile.TarError, ValueError, ArithmeticError) as error:
            raise DamagedArchiveError(str(error)) from error
    return {member.name: (member.size, mtime_ns) for member, mtime_ns in members}


def archives_in(archive_dir: Path) -> Iterator[Path]:
    """Return the archives of a directory, in no order."""
    return archive_dir.glob("*.tar")


def divide(archives: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Divide archives, newest first, into those within the limits and those that are too many."""
    aged: list[tuple[int, Path, int]] = []
    for path in archives:
        with suppress(FileNotFoundError):  # another replica has replaced it
            status = path.stat()
            aged.append((status.st_mtime_ns, path, status.st_size))
    aged.sort(reverse=True)
    totals = accumulate(size for _, _, size in aged[:_MAX_ARCHIVES])
    within = sum(total <= _MAX_BYTES for total in totals)
    paths = [path for _, path, _ in aged]
    return paths[:within], paths[within:]


def tidy(archive_dir: Path, replaced: Iterable[Path]) -> None:
    """Remove archives that others replace, those that are too many, and what writers that were killed left.

    Raises:
        OSError: `archive_dir` cannot be written to.
    """
    _, too_many = divide(archives_in(archive_dir))
    abandoned = [path for path in archive_dir.glob(".*.tmp") if time.time() - path.stat().st_mtime > _ABANDONED_S]
    for path in (*replaced, *too_many, *abandoned):
        path.unlink(missing_ok=True)


def _add(tar: tarfile.TarFile, directory: Path, name: str, stamp: Stamp) -> bool:
    try:
        with (directory / name).open("rb") as file:
            content = file.read()
            status = os.fstat(file.fileno())
    except OSError:
        return False
    if (len(content), status.st_mtime_ns) != stamp or status.st_size != stamp[0]:
        return False
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), stat.S_IMODE(status.st_mode)
    member.mtime = status.st_mtime_ns // 10**9
    # tarfile's own mtime is a float, off by up to 120 ns, and ninja compares nanoseconds: of 20 builds that tarfile
    # extracted 10 started again, of ours none. This header overrides tarfile's own field.
    member.pax_headers = {"mtime": str(Decimal(status.st_mtime_ns) / 10**9)}
    tar.addfile(member, io.BytesIO(content))
    return True


def _mtime_ns(member: tarfile.TarInfo) -> int:
    return int(Decimal(member.pax_headers.get("mtime", member.mtime)) * 10**9)


def _checked(member: tarfile.TarInfo, directory: Path) -> tarfile.TarInfo:
    """Return a member as tarfile's filter for data leaves it: inside the directory, no odd permissions."""
    safe = tarfile.data_filter(member, str(directory))
    if not member.isreg() or safe.name != member.name:
        raise DamagedArchiveError(f"{member.name!r} is not a regular file with a relative name")
    return safe


def _place(tar: tarfile.TarFile, member: tarfile.TarInfo, mtime_ns: int, directory: Path) -> None:
    path = directory / member.name
    path.parent.mkdir(parents=True, exist_ok=True)
    content = tar.extractfile(member)
    assert content is not None  # noqa: S101 - a regular file has content
    with _temporary(path.parent) as new:
        with new.open("wb") as file:
            shutil.copyfileobj(content, file)
        new.chmod(member.mode)
        os.utime(new, ns=(mtime_ns, mtime_ns))
        new.replace(path)


@contextmanager
def _temporary(directory: Path) -> Iterator[Path]:
    """Make an empty file; it is removed in the end if it was not renamed."""
    descriptor, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=directory)
    os.close(descriptor)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
