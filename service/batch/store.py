"""Files and batches of API clients, in a directory: each client has one, and nobody sees another's.

A record is a small JSON file that is written whole or not at all, and has one writer at a time: a batch's is the
gateway until it is begun, then what drives it. A request to cancel is a file of its own.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar
from urllib.parse import quote, unquote

import msgspec

from service.boots.records import new_id, state_directory
from service.errors import one_line
from service.files import atomic_write
from service.in_engine.vllm_service.http_contract import MIB

QUOTA = 10 * 1024 * MIB  # bytes of all files of a key, answers included
MOST_FILES, MOST_BATCHES = 1000, 1000  # of a key
KEPT_S = 30 * 86_400
_UPLOAD_S = 86_400  # after which a file that has not arrived whole is removed
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}  # of a directory, on some network file systems
_PREFIX, _UPLOAD = "key-", ".upload-"
_IDENTITY = "="  # is never in a quoted name
_CANCEL, _CHANGED = "cancel", "changed"
_FINAL = frozenset(("completed", "failed", "expired", "cancelled"))
_log = logging.getLogger(__name__)

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
End = Literal["completed", "failed", "expired", "cancelled"]
Purpose = Literal["batch", "batch_output"]


class StoredFile(msgspec.Struct, kw_only=True):
    """What is known of a file.

    Attributes:
        id: Its name here.
        bytes: Its size.
        created_at: Seconds since 1970, as all times here.
        expires_at: When it is removed.
        filename: What its owner calls it.
        purpose: Whether it was uploaded or has answers.
        lines: How many ends of lines it has.
    """

    id: str
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Purpose
    lines: int = 0

    def to_fields(self) -> dict[str, object]:
        """Return it as OpenAI's API has it."""
        fields = {name: getattr(self, name) for name in ("id", "bytes", "created_at", "expires_at", "filename")}
        return {**fields, "object": "file", "purpose": self.purpose, "status": "processed", "status_details": None}


class BatchError(msgspec.Struct, kw_only=True):
    """What is wrong with a batch as a whole, as OpenAI's API has it."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class Counts(msgspec.Struct):
    """Lines of a batch."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(msgspec.Struct, kw_only=True):
    """A batch, with the fields of OpenAI's API.

    Attributes:
        output_id: The file that its answers go to.
        error_id: The file of its errors.
        output_kept_s: How long both are kept.
        end: Its last status, once it is finalizing.
        failed_starts: Of models, as `FailedStarts` has them.
    """

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    output_id: str
    error_id: str
    status: Status = "validating"
    metadata: dict[str, str] | None = None
    errors: list[BatchError] = []
    request_counts: Counts = msgspec.field(default_factory=Counts)
    output_file_id: str | None = None
    error_file_id: str | None = None
    output_kept_s: int = KEPT_S
    end: End | None = None
    failed_starts: dict[str, tuple[float, float]] = {}
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None

    @property
    def is_final(self) -> bool:
        """Whether nothing of it changes any more."""
        return self.status in _FINAL

    def to_fields(self) -> dict[str, object]:
        """Return it as OpenAI's API has it."""
        fields: dict[str, object] = msgspec.to_builtins(self)
        for own in ("output_id", "error_id", "output_kept_s", "end", "failed_starts"):
            del fields[own]
        fields["errors"] = {"object": "list", "data": fields["errors"]} if self.errors else None
        return {**fields, "object": "batch"}


_T = TypeVar("_T", StoredFile, Batch)
# msgspec 0.22 looks at a type when it first decodes one, and two threads that do so at once crash the interpreter.
_DECODERS: dict[type[Any], msgspec.json.Decoder[Any]] = {of: msgspec.json.Decoder(of) for of in (StoredFile, Batch)}


class ClientStore:
    """The files and batches of one client.

    Args:
        directory: Where they are.
        publish: Makes what was written visible elsewhere, or raises an OSError. Blocks.
        unpublished: Ids of the batches that are being added, which nothing may drive yet.
    """

    def __init__(self, directory: Path, publish: Callable[[], None], unpublished: set[str]) -> None:
        self.directory, self.publish, self.unpublished = directory, publish, unpublished

    @property
    def owner(self) -> str:
        """The name of the client's key."""
        return unquote(self._names[0])

    @property
    def identity(self) -> str:
        """Which of all clients that had this name it is."""
        return self._names[2]

    @property
    def _names(self) -> tuple[str, str, str]:
        return self.directory.name.removeprefix(_PREFIX).partition(_IDENTITY)

    def files(self) -> list[StoredFile]:
        """Return all files, newest first."""
        return self._records("files", StoredFile)

    def file(self, name: str) -> StoredFile | None:
        """Return a file; None: there is none."""
        return self._record("files", name, StoredFile)

    def content(self, name: str) -> Path:
        """Return where a file's content is."""
        return self.directory / "files" / name / "content"

    def make_directory(self, *names: str) -> None:
        """Make a directory of the client where there is none, and its own, for this user alone."""
        directory = self.directory.parent
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in (self.directory.name, *names):
            if directory.stat().st_mode & 0o077:
                with contextlib.suppress(OSError):  # a volume may belong to another user, or have no modes
                    directory.chmod(0o700)
            directory /= name
            directory.mkdir(exist_ok=True, mode=0o700)

    def upload_directory(self) -> Path:
        """Return a directory, which is not there yet, for a file that arrives; `add` takes it."""
        return self.directory / "files" / f"{_UPLOAD}{new_id()}"

    def open_upload(self, directory: Path) -> BinaryIO:
        """Make this directory, and return the content of the file that arrives there."""
        self.make_directory("files", directory.name)
        return os.fdopen(os.open(directory / "content", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600), "wb")

    def add(self, file: StoredFile, upload: Path) -> None:
        """Take a file that has arrived whole.

        Raises:
            OSError: It cannot be kept or published, and is not there.
        """
        _sync(upload / "content")
        _write(upload / "record.json", file)
        added = upload.rename(upload.with_name(file.id))
        try:
            _sync(upload.parent)
            self.publish()
        except BaseException:
            shutil.rmtree(added, ignore_errors=True)
            raise

    def save_file(self, file: StoredFile) -> None:
        """Write the record of a file whose content is there."""
        _write(self.directory / "files" / file.id / "record.json", file)
        _sync(self.directory / "files")

    def delete(self, name: str) -> None:
        """Remove a file; where that cannot be published now, the next publication has it too."""
        shutil.rmtree(self.directory / "files" / name, ignore_errors=True)
        try:
            self.publish()
        except OSError as error:
            _log.warning("The removal of '%s' was not published: %s", name, one_line(error))

    def used_bytes(self, besides: Collection[str] = ()) -> int:
        """Return the size of all files, of those too that are being written, besides some directories."""
        names = {entry.name for entry in _entries(self.directory / "files")}.difference(besides)
        return sum(size_of(self.content(name)) for name in names)

    @property
    def is_full(self) -> bool:
        """Whether its files have more than they may."""
        return self.used_bytes() > QUOTA

    def batches(self) -> list[Batch]:
        """Return all batches, newest first."""
        return [self._as_asked(batch) for batch in self._records("batches", Batch)]

    def batch(self, name: str) -> Batch | None:
        """Return a batch; None: there is none."""
        batch = self._record("batches", name, Batch)
        return batch and self._as_asked(batch)

    def add_batch(self, batch: Batch) -> None:
        """Take a new batch, which is driven once it is published.

        Raises:
            OSError: It cannot be kept or published, and is not there.
        """
        self.unpublished.add(batch.id)
        try:
            self.save_batch(batch)
            self.publish()
            self.tell()
        except BaseException:
            shutil.rmtree(self.directory / "batches" / batch.id, ignore_errors=True)
            raise
        finally:
            self.unpublished.discard(batch.id)

    def save_batch(self, batch: Batch) -> None:
        """Write a batch, so that it outlives a loss of power."""
        self.make_directory("batches", batch.id)
        _write(self.directory / "batches" / batch.id / "record.json", batch)
        _sync(self.directory / "batches")

    def ask_to_cancel(self, batch: Batch) -> None:
        """Have a batch cancelled by what drives it."""
        with contextlib.suppress(FileExistsError):
            (self.directory / "batches" / batch.id / _CANCEL).touch(exist_ok=False)
        self.tell()
        self.publish()

    def tell(self) -> None:
        """Have the gateway that drives batches look for this client's, whichever gateway that is."""
        (self.directory.parent / _CHANGED).touch(mode=0o600)

    def cancel_asked_at(self, batch: Batch) -> int | None:
        """Return when a batch was asked to be cancelled; None: it was not."""
        try:
            return int((self.directory / "batches" / batch.id / _CANCEL).stat().st_mtime)
        except OSError:
            return None

    def _as_asked(self, batch: Batch) -> Batch:
        asked_at = self.cancel_asked_at(batch)
        if asked_at and batch.status in {"validating", "in_progress"}:
            batch.status, batch.cancelling_at = "cancelling", asked_at
        return batch

    def _records(self, kind: str, of: type[_T]) -> list[_T]:
        names = sorted((entry.name for entry in _entries(self.directory / kind)), reverse=True)
        return [record for name in names if (record := self._record(kind, name, of))]

    def _record(self, kind: str, name: str, of: type[_T]) -> _T | None:
        try:
            record: _T = _DECODERS[of].decode((self.directory / kind / name / "record.json").read_bytes())
        except (OSError, msgspec.DecodeError, ValueError):
            return None
        return record if isinstance(record, Batch) or record.expires_at > time.time() else None

    def remove_expired(self, now: float) -> None:
        """Remove files whose time is over, batches that ended long ago, and what no upload or batch will go on with."""
        unfinished = {name for batch in self.batches() if not batch.is_final for name in files_of(batch)}
        for entry in _entries(self.directory / "files"):
            record = Path(entry.path) / "record.json"
            is_over = _is_expired(record, now) if record.exists() else now - entry.stat().st_mtime > _UPLOAD_S
            if is_over and entry.name not in unfinished:
                shutil.rmtree(entry.path, ignore_errors=True)
        for batch in self.batches():
            if batch.is_final and batch.expires_at + KEPT_S < now:
                shutil.rmtree(self.directory / "batches" / batch.id, ignore_errors=True)


class Store:
    """The files and batches of all clients.

    Args:
        root: Its directory.
        publish: Makes what was written visible elsewhere, or raises an OSError. Blocks.
    """

    def __init__(self, root: Path, publish: Callable[[], None] = lambda: None) -> None:
        self.root, self._publish = root, publish
        self._unpublished: set[str] = set()

    def of(self, owner: str, identity: str = "") -> ClientStore:
        """Return the files and batches of a client; another one that has its name later has a directory of its own."""
        name = quote(owner, safe="") + (f"{_IDENTITY}{identity}" if identity else "")
        return ClientStore(self.root / f"{_PREFIX}{name}", self._publish, self._unpublished)

    def clients(self) -> Iterator[ClientStore]:
        """Yield all clients that have a directory."""
        for entry in _entries(self.root):
            if entry.name.startswith(_PREFIX):
                yield ClientStore(Path(entry.path), self._publish, self._unpublished)

    def changes(self) -> int:
        """Return a number that is another one after each `tell`."""
        try:
            return (self.root / _CHANGED).stat().st_mtime_ns
        except OSError:
            return 0

    def rates(self) -> dict[str, float]:
        """Return how many lines a second batches of an endpoint and a model took last."""
        try:
            return msgspec.json.decode((self.root / "rates.json").read_bytes(), type=dict[str, float])
        except (OSError, msgspec.DecodeError):
            return {}

    def save_rate(self, name: str, lines_per_s: float) -> None:
        """Keep a rate."""
        rates = {**self.rates(), name: lines_per_s}
        newest = dict([*rates.items()][-1000:])
        atomic_write(self.root / "rates.json", msgspec.json.encode(newest), 0o600)


def local_root() -> Path:
    """Return the directory of this machine."""
    return state_directory() / "batches"


def files_of(batch: Batch) -> tuple[str, ...]:
    """Return the files that a batch needs."""
    return batch.input_file_id, batch.output_id, batch.error_id


def _is_expired(record: Path, now: float) -> bool:
    """Tell whether a file's time is over; one whose record cannot be read now is kept."""
    try:
        file: StoredFile = _DECODERS[StoredFile].decode(record.read_bytes())
    except (OSError, msgspec.DecodeError, ValueError):
        return False
    return file.expires_at <= now


def _write(file: Path, record: StoredFile | Batch) -> None:
    """Write a record so that it outlives a loss of power."""
    atomic_write(file, msgspec.json.encode(record), 0o600, is_synced=True)
    _sync(file.parent)


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    except OSError as error:
        if not (path.is_dir() and error.errno in _NO_SYNC):
            raise
    finally:
        os.close(opened)


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as found:
            return [*found]
    except OSError:
        return []


def size_of(file: Path) -> int:
    """Return the size of a file; 0: there is none."""
    try:
        return file.stat().st_size
    except OSError:
        return 0
