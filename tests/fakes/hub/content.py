"""What the fake hub has, which tokens may read it, what goes wrong, and which requests it got."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Literal

Content = bytes | Path
_CONTENT = re.compile(r"GET (?:cdn:/[^/]+/[^/]+/[0-9a-f]{64}|/[^/]+/[^/]+/resolve/[^/]+)/(.+)")


@dataclass
class Repository:
    """One repository with one commit.

    Attributes:
        commit: Its only revision; `main` means the same.
        files: Name -> content, or the file that holds it.
        gated: What needs the right token: the files alone, or their list too.
        large: Patterns of the files that are kept as LFS objects and come from the CDN.
        changed: Contents that are sent instead of listed ones, as if a file had changed after it was listed.
    """

    commit: str
    files: dict[str, bytes] | dict[str, Content]
    gated: Literal["", "files", "all"] = ""
    large: tuple[str, ...] = ()
    changed: dict[str, bytes] = field(default_factory=dict)

    def is_large(self, path: str) -> bool:
        """Tell whether the CDN has the file."""
        return any(fnmatch(path, pattern) for pattern in self.large)

    def entry(self, path: str) -> dict[str, object]:
        """Return the file's row in a list, as the hub writes it."""
        content = self.files[path]
        row: dict[str, object] = {"type": "file", "path": path, "size": size(content), "oid": git_sha1(content)}
        if self.is_large(path):
            row["lfs"] = {"oid": sha256(content), "size": size(content), "pointerSize": 134}
        return row

    def sent(self, path: str) -> Content:
        """Return the content that a download gets."""
        return self.changed.get(path, self.files[path])

    def etag(self, path: str) -> str:
        """Return the ETag of the content that is sent."""
        return sha256(self.sent(path)) if self.is_large(path) else git_sha1(self.sent(path))


@dataclass
class Fault:
    """Something that goes wrong with the next requests that match.

    Attributes:
        where: Found in `GET /path` or `GET cdn:/path`, a regular expression.
        times: How often; -1: always.
        status: Answered instead of anything else.
        headers: Sent with that status.
        cut_after: Bytes of the content after which the connection is closed.
        content: Sent instead of the right one.
        bytes_per_s: The rate at which content is sent.
        stalls: No answer is sent until the hub stops.
    """

    where: str
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    content: bytes | None = None
    bytes_per_s: int | None = None
    stalls: bool = False


@dataclass
class Hub:
    """The hub's content, and the requests that it got.

    Attributes:
        token: Of the account that may read everything.
        unlicensed_tokens: Tokens of accounts that accepted no licence; any other token is unknown.
        renamed: Old name -> new name; requests for the old one are redirected.
        page: Rows of one page of a list of files.
        requests: Method and path of every request, in order; those to the CDN begin with `cdn:`.
        unknown: Requests that the fake does not know, and tokens that were sent to the CDN.
        served: Bytes of content that were sent.
        stopped: Set when as many bytes were sent as `stop_after` allows.
    """

    token: str = "hf_right"
    unlicensed_tokens: tuple[str, ...] = ("hf_unlicensed",)
    repositories: dict[str, Repository] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    fails_with: int | None = None
    page: int = 1000
    files_requested: threading.Event = field(default_factory=threading.Event)
    may_send_files: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    requests: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    served: int = 0
    url: str = ""
    cdn_url: str = ""

    def __post_init__(self) -> None:
        """Hold no file back."""
        self.may_send_files.set()
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        self._resumed = threading.Event()
        self._limit: int | None = None

    def stop_after(self, count: int) -> None:
        """Send that many bytes of content and no more until `resume`; then `stopped` is set."""
        with self.lock:
            self._limit = self.served + count
        self.stopped.clear()
        self._resumed.clear()

    def resume(self) -> None:
        """Send again."""
        with self.lock:
            self._limit = None
        self._resumed.set()

    def may_send(self, count: int) -> int:
        """Count bytes and return how many may be sent now; blocks where that would be none."""
        while not self.ended.is_set():
            with self.lock:
                left = count if self._limit is None else min(count, self._limit - self.served)
                if left > 0:
                    self.served += left
                    return left
            self.stopped.set()
            self._resumed.wait(1)
        raise ConnectionAbortedError("the hub has ended")

    @contextmanager
    def holding_files(self) -> Iterator[None]:
        """Answer no request for a file's content while the block lasts; `files_requested` tells of the first one."""
        self.may_send_files.clear()
        try:
            yield
        finally:
            self.may_send_files.set()

    def fault(self, request: str) -> Fault | None:
        """Return the fault of a request, and count it."""
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.where, request):
                    fault.times -= 1
                    return fault
        return None

    def downloads(self, *paths: str) -> list[str]:
        """Return the file of each request for content; with `paths`, of those alone."""
        found = [match[1] for line in self.requests if (match := _CONTENT.fullmatch(line))]
        return [path for path in found if not paths or path in paths]


def size(content: Content) -> int:
    """Return the number of bytes."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


@cache
def sha256(content: Content) -> str:
    """Return the checksum of a large file."""
    return _digest("sha256", b"", content)


@cache
def git_sha1(content: Content) -> str:
    """Return git's checksum of a file."""
    return _digest("sha1", f"blob {size(content)}\0".encode(), content)


def _digest(name: str, header: bytes, content: Content) -> str:
    digest = hashlib.new(name, header)
    if isinstance(content, bytes):
        digest.update(content)
    else:
        with content.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()
