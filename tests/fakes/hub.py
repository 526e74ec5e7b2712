"""A model hub on loopback: file lists, files, and the refusals that huggingface_hub knows by their headers.

What it is asked and does not know it remembers in `unknown`; the fixture that starts it fails the test then.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import unquote, urlsplit

_TREE = re.compile(r"/api/models/([\w.-]+/[\w.-]+)/tree/([\w.-]+)")
_INFO = re.compile(r"/api/models/([\w.-]+/[\w.-]+)/revision/([\w.-]+)")
_FILE = re.compile(r"/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)")


@dataclass
class Repository:
    """One repository with one commit.

    Attributes:
        commit: Its only revision; `main` means the same.
        files: Name -> content.
        gated: What is kept from strangers: the files alone, or the list of them too.
    """

    commit: str
    files: dict[str, bytes]
    gated: Literal["", "files", "all"] = ""


@dataclass
class Hub:
    """The hub's content, and what it was asked."""

    token: str = "hf_right"
    repositories: dict[str, Repository] = field(default_factory=dict)
    fails_with: int | None = None
    cuts_files: bool = False
    asked_for_files: threading.Event = field(default_factory=threading.Event)
    may_send_files: threading.Event = field(default_factory=threading.Event)
    asked: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    url: str = ""

    def __post_init__(self) -> None:
        """Hold no file back."""
        self.may_send_files.set()

    @contextmanager
    def holding_files(self) -> Iterator[None]:
        """Answer no request for a file's content while the block lasts; `asked_for_files` tells of the first one."""
        self.may_send_files.clear()
        try:
            yield
        finally:
            self.may_send_files.set()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve the hub on a free port until the end of the block."""
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Write nothing of a client that left; anything else is the test's to see."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Write nothing."""

    def do_HEAD(self) -> None:
        """Answer without a body."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer one request."""
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if self.hub.fails_with:
            self.answer(self.hub.fails_with, b"scripted")
        elif match := _TREE.fullmatch(path) or _INFO.fullmatch(path):
            self.listing(match[1], match[2], "/tree/" in path)
        elif match := _FILE.fullmatch(path):
            self.file(*match.groups())
        elif path in {
            "/",
            "/api/agent-harnesses",
        }:  # the client asks for this list too
            self.answer(200, b"{}")
        else:
            self.hub.unknown.append(self.path)
            self.answer(404)

    def opened(self, name: str, revision: str, needs_access: bool) -> Repository | None:
        """Return the repository, or refuse with the header that tells why not."""
        repository = self.hub.repositories.get(name)
        known = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if repository is None:
            self.answer(*((404, b"") if known else (401, b"")), {"X-Error-Code": "RepoNotFound"})
        elif revision not in {"main", repository.commit}:
            self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        elif needs_access and not known:
            self.answer(401, headers={"X-Error-Code": "GatedRepo"})
        else:
            return repository
        return None

    def listing(self, name: str, revision: str, is_tree: bool) -> None:
        repository = self.hub.repositories.get(name)
        if (found := self.opened(name, revision, repository is not None and repository.gated == "all")) is None:
            return
        rows = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}  # noqa: S324
            for path, content in found.files.items()
        ]
        info = {"id": name, "modelId": name, "sha": found.commit, "siblings": []}
        self.answer(200, json.dumps(rows if is_tree else info).encode(), {"Content-Type": "application/json"})

    def file(self, name: str, revision: str, path: str) -> None:
        repository = self.hub.repositories.get(name)
        found = self.opened(name, revision, repository is not None and bool(repository.gated))
        if found is None:
            return
        content = found.files[path]
        if self.command == "GET":
            self.hub.asked_for_files.set()
            self.hub.may_send_files.wait(30)
        if self.command == "GET" and self.hub.cuts_files:
            self.cut(content)
            return
        tag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": found.commit}  # noqa: S324
        self.answer(200, content, tag)

    def cut(self, content: bytes) -> None:
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) + 1))
        self.end_headers()

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
