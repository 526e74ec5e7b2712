"""The hub's two ports: its routes, and the CDN that large files come from."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

from .content import Content, Fault, Hub, Repository, size

_NAME = r"([\w.-]+/[\w.-]+)"
_INFO = re.compile(rf"/api/models/{_NAME}(?:/revision/([\w.-]+))?")
_TREE = re.compile(rf"/api/models/{_NAME}/tree/([\w.-]+)")
_PATHS = re.compile(rf"/api/models/{_NAME}/paths-info/([\w.-]+)")
_FILE = re.compile(rf"/{_NAME}/resolve/([\w.-]+)/(.+)")
_OBJECT = re.compile(rf"/{_NAME}/([0-9a-f]{{64}})/(.+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_PIECE = 1 << 22


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve the hub and its CDN on free ports while the block lasts."""
    servers = []
    for handler in (_HubHandler, _CdnHandler):
        server = _Server(("127.0.0.1", 0), type(handler.__name__, (handler,), {"hub": hub}))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((server, thread))
    hub.url, hub.cdn_url = (f"http://127.0.0.1:{server.server_port}" for server, _ in servers)
    try:
        yield hub
    finally:
        hub.ended.set()
        for server, thread in servers:
            server.shutdown()
            server.server_close()
            thread.join()


class _Server(ThreadingHTTPServer):
    block_on_close = False  # a client may keep its connection

    def handle_error(self, request: object, client_address: object) -> None:
        """Write nothing about a client that disconnected; show the test any other error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    prefix = ""
    failing: Fault | None

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Write nothing."""

    def do_HEAD(self) -> None:
        """Answer without a body."""
        self.do_GET()

    def do_POST(self) -> None:
        """Answer one request."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer one request, or do what its fault says."""
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {self.prefix}{path}"
        self.hub.requests.append(request)
        self.failing = self.hub.fault(request)
        if self.failing and self.failing.stalls:
            self.close_connection = True
            self.hub.ended.wait(60)
        elif self.failing and self.failing.status:
            self.answer(self.failing.status, b"scripted", self.failing.headers)
        elif self.hub.fails_with:
            self.answer(self.hub.fails_with, b"scripted")
        else:
            self.route(path)

    def route(self, path: str) -> None:
        raise NotImplementedError

    def answer_unknown(self) -> None:
        self.hub.unknown.append(f"{self.prefix}{self.path}")
        self.answer(404)

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_content(self, content: Content, headers: dict[str, str]) -> None:
        """Send a file or the requested part of it, as its fault says."""
        fault = self.failing or Fault("")
        begin, end, total = 0, size(content), size(content)
        if requested := _RANGE.fullmatch(self.headers.get("Range", "")):
            begin, end = int(requested[1]), min(int(requested[2]) + 1 if requested[2] else total, total)
            if begin >= total:
                self.answer(416, headers={"Content-Range": f"bytes */{total}"})
                return
            headers = {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{total}"}
        self.answer(206 if requested else 200, headers={**headers, "Content-Length": str(end - begin)})
        if self.command == "HEAD":
            return
        self.hub.files_requested.set()
        self.hub.may_send_files.wait(30)
        if fault.content is not None:
            content = fault.content
        if fault.cut_after is not None:
            end = min(end, begin + fault.cut_after)
            self.close_connection = True  # before all bytes that the headers promise
        self.stream(content, begin, end, fault.bytes_per_s)

    def stream(self, content: Content, begin: int, end: int, bytes_per_s: int | None) -> None:
        self.wfile.flush()
        piece = _PIECE if bytes_per_s is None else max(1, bytes_per_s // 20)
        file = content.open("rb") if isinstance(content, Path) else None
        try:
            while begin < end and not self.hub.ended.is_set():
                count = self.hub.may_send(min(piece, end - begin))
                if file:
                    count = os.sendfile(self.connection.fileno(), file.fileno(), begin, count)
                else:
                    assert isinstance(content, bytes)
                    self.connection.sendall(memoryview(content)[begin : begin + count])
                begin += count
                if bytes_per_s is not None:
                    time.sleep(count / bytes_per_s)
        finally:
            if file:
                file.close()


class _HubHandler(_Handler):
    def route(self, path: str) -> None:
        if (old := next((old for old in self.hub.renamed if f"/{old}/" in f"{path}/"), None)) is not None:
            self.answer(307, headers={"Location": self.path.replace(old, self.hub.renamed[old], 1)})
        elif match := _TREE.fullmatch(path):
            self.tree(match[1], match[2])
        elif self.command == "POST" and (match := _PATHS.fullmatch(path)):
            self.paths(match[1], match[2])
        elif match := _INFO.fullmatch(path):
            self.info(match[1], match[2] or "main")
        elif match := _FILE.fullmatch(path):
            self.file(*match.groups())
        elif path in {"/", "/api/agent-harnesses"}:  # the client asks for this list too
            self.answer(200, b"{}")
        else:
            self.answer_unknown()

    def authorize(self, name: str, revision: str, *, of_files: bool) -> Repository | None:
        """Return the repository, or refuse with the header that gives the reason."""
        repository = self.hub.repositories.get(name)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in {self.hub.token, *self.hub.unlicensed_tokens}:
            self.refuse(401, message="Invalid credentials in Authorization header")
        elif repository is None:
            self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        elif revision not in {"main", repository.commit}:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif token != self.hub.token and (repository.gated == "all" or (of_files and repository.gated)):
            self.refuse(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted.")
        else:
            return repository
        return None

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer(status, json.dumps({"error": message}).encode(), headers)

    def info(self, name: str, revision: str) -> None:
        if (found := self.authorize(name, revision, of_files=False)) is None:
            return
        siblings = [{"rfilename": path} for path in found.files]
        gated = "manual" if found.gated else False
        self.answer_json({"id": name, "modelId": name, "sha": found.commit, "gated": gated, "siblings": siblings})

    def tree(self, name: str, revision: str) -> None:
        if (found := self.authorize(name, revision, of_files=False)) is None:
            return
        query = parse_qs(urlsplit(self.path).query)
        begin = int(query.get("cursor", ["0"])[0])
        paths = list(found.files)
        headers = {}
        if begin + self.hub.page < len(paths):
            following = (
                f"{self.hub.url}/api/models/{name}/tree/{revision}?recursive=True&cursor={begin + self.hub.page}"
            )
            headers["Link"] = f'<{following}>; rel="next"'
        rows = [found.entry(path) for path in paths[begin : begin + self.hub.page]]
        folders = sorted({path.rpartition("/")[0] for path in paths if "/" in path}) if begin == 0 else []
        self.answer_json(
            [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders] + rows, headers
        )

    def paths(self, name: str, revision: str) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if (found := self.authorize(name, revision, of_files=False)) is not None:
            self.answer_json([found.entry(path) for path in body["paths"] if path in found.files])

    def file(self, name: str, revision: str, path: str) -> None:
        if (found := self.authorize(name, revision, of_files=True)) is None:
            return
        commit = {"X-Repo-Commit": found.commit}
        if path not in found.files:
            self.answer(404, headers={"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", **commit})
            return
        etag = found.etag(path)
        if not found.is_large(path):
            self.send_content(found.sent(path), {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", **commit})
            return
        linked = {"X-Linked-Size": str(size(found.sent(path))), "X-Linked-ETag": f'"{etag}"', **commit}
        self.answer(302, headers={"Location": f"{self.hub.cdn_url}/{name}/{etag}/{quote(path)}", **linked})

    def answer_json(self, content: object, headers: dict[str, str] | None = None) -> None:
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})


class _CdnHandler(_Handler):
    prefix = "cdn:"

    def route(self, path: str) -> None:
        if "Authorization" in self.headers:
            self.hub.unknown.append(f"a token for cdn:{path}")
        match = _OBJECT.fullmatch(path)
        found = self.hub.repositories.get(match[1]) if match else None
        if match is None or found is None or found.etag(match[3]) != match[2]:
            self.answer_unknown()
            return
        self.send_content(found.sent(match[3]), {"ETag": f'"{match[2]}"', "Accept-Ranges": "bytes"})
