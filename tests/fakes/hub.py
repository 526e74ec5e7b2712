"""A model hub on loopback for huggingface_hub's real client: repositories from directories, pinned revisions, gating.

It knows the routes that a pinned download uses, answers 404 to others and keeps a list of all requests. The whole hub, with
its failures, is a later piece of work.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """One model repository: files of one revision."""

    directory: Path
    revision: str
    token: str | None = None  # gated: only this token gets files

    def files(self) -> dict[str, Path]:
        """Return the repository's files by their paths in it."""
        found = sorted(path for path in self.directory.rglob("*") if path.is_file())
        return {str(path.relative_to(self.directory)): path for path in found}


@dataclass
class Hub:
    """The server. `url` is what HF_ENDPOINT is set to."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)

    def __enter__(self) -> Self:
        """Serve from a thread."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    @property
    def port(self) -> int:
        """Port on loopback."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Address without a path."""
        return f"http://127.0.0.1:{self.port}"


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Keep quiet: `requests` has them."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) >= 6:
            self._listing("/".join(parts[2:4]), parts[4], parts[5])
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._send(404, b"{}")

    def _repository(self, name: str, revision: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif revision not in {repository.revision, "main"}:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            return repository
        return None

    def _listing(self, name: str, kind: str, revision: str) -> None:
        repository = self._repository(name, revision)
        if repository is None:
            return
        if kind == "revision":
            siblings = [{"rfilename": path} for path in repository.files()]
            self._send(200, json.dumps({"id": name, "sha": repository.revision, "siblings": siblings}).encode())
        else:
            files = repository.files().items()
            tree = [
                {"type": "file", "path": path, "size": file.stat().st_size, "oid": _etag(file)} for path, file in files
            ]
            self._send(200, json.dumps(tree).encode())

    def _file(self, name: str, revision: str, path: str) -> None:
        repository = self._repository(name, revision)
        if repository is None:
            return
        if repository.token and self.headers.get("Authorization") != f"Bearer {repository.token}":
            status = 403 if self.headers.get("Authorization") else 401
            self._send(status, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        elif (file := repository.files().get(path)) is None:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        else:
            headers = {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": repository.revision}
            self._send(200, file.read_bytes(), headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()  # noqa: S324 - a content address, as git has it
