"""Files of pages for browsers: package data, with headers by which a page loads nothing from elsewhere."""

from __future__ import annotations

import gzip
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from service.gateway.threads import in_thread

_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}
# No script, style, image or connection of another host, nothing inline, in no other page's frame. With Trusted Types a
# browser that knows them refuses to parse any text as HTML.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-cache",  # asked for again at each visit; the tag saves the transfer
}
_REFUSES_GZIP = re.compile(r"gzip\s*;\s*q=0(?:\.0*)?(?:,|$)")


@dataclass(frozen=True)
class StaticFile:
    """A file as it is sent.

    Attributes:
        is_gzipped: The content is compressed; a client that does not take that gets it decompressed.
    """

    content: bytes
    media_type: str
    tag: str
    is_gzipped: bool = False

    @classmethod
    def of(cls, content: bytes, media_type: str, *, is_gzipped: bool = False) -> StaticFile:
        """Return the file with this content."""
        return cls(content, media_type, f'W/"{hashlib.sha256(content).hexdigest()[:16]}"', is_gzipped)

    async def answer(self, request: Request) -> Response:
        """Return the answer to a request: 304 where the browser has the file."""
        headers = {**_HEADERS, "etag": self.tag, **({"vary": "accept-encoding"} if self.is_gzipped else {})}
        if request.headers.get("if-none-match") == self.tag:
            return Response(status_code=304, headers=headers)
        content = self.content
        if self.is_gzipped and takes_gzip(request.headers.get("accept-encoding", "")):
            headers["content-encoding"] = "gzip"
        elif self.is_gzipped:
            content = await in_thread(lambda: gzip.decompress(self.content))
        return Response(content, media_type=self.media_type, headers=headers)


def takes_gzip(accepted: str) -> bool:
    """Tell whether a client takes a compressed answer, by its `Accept-Encoding`."""
    return "gzip" in accepted and not _REFUSES_GZIP.search(accepted)


def read_directory(directory: Path) -> dict[str, StaticFile]:
    """Return the files of a directory that browsers load, by the names under which they ask for them.

    A file `<name>.gz` is the file `<name>`, compressed.
    """
    found = {}
    for path in directory.iterdir():
        is_gzipped = path.suffix == ".gz"
        name = path.stem if is_gzipped else path.name
        if media_type := _TYPES.get(Path(name).suffix):
            found[name] = StaticFile.of(path.read_bytes(), media_type, is_gzipped=is_gzipped)
    return found
