"""The page `/docs`: Swagger UI from the package, as it was published, with the console's headers."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import re
from urllib.parse import urljoin

import pytest

from service.gateway.clients import ClientRegistry
from service.gateway.openapi import DIRECTORY
from service.gateway.static_files import takes_gzip
from tests.gateway.upstream import KEYS, serve_gateway

BASE = "https://host/prefix"
FILES = ("swagger-ui-bundle.js", "swagger-ui.css", "page.js", "page.css")
SUMS = dict(reversed(line.split("  ")) for line in (DIRECTORY / "SHA256SUMS").read_text().splitlines())


@pytest.mark.parametrize("name", SUMS)
def test_vendored_file_is_as_it_was_published(name: str) -> None:
    """Its hash is that of the file in the package of npm, compressed here or not."""
    path = DIRECTORY / name
    content = path.read_bytes() if path.exists() else gzip.decompress((DIRECTORY / f"{name}.gz").read_bytes())
    assert hashlib.sha256(content).hexdigest() == SUMS[name]


def test_vendored_files_have_their_licence() -> None:
    """Swagger UI is under Apache 2.0, which wants licence and notice beside it."""
    assert {"LICENSE", "NOTICE", "swagger-ui-bundle.js", "swagger-ui.css"} <= {*SUMS}
    assert "Apache License" in (DIRECTORY / "LICENSE").read_text()
    assert {path.stem for path in DIRECTORY.glob("*.gz")} <= {*SUMS}


@pytest.mark.parametrize("path", ["/docs", "/docs/", *(f"/docs/{name}" for name in FILES), "/openapi.json"])
def test_page_files_and_document_need_no_key_and_have_strict_headers(path: str) -> None:
    """The policy is the console's: nothing of another host, nothing inline, no text that becomes HTML."""

    async def run() -> None:
        async with serve_gateway(ClientRegistry(KEYS)) as gateway:
            async with gateway.http.get(gateway.url) as answer:
                policy = answer.headers["content-security-policy"]
            async with gateway.http.get(gateway.url + path) as answer:
                assert answer.status == 200
                assert answer.headers["content-security-policy"] == policy
                assert answer.headers["x-content-type-options"] == "nosniff"
                tag = answer.headers["etag"]
            async with gateway.http.get(gateway.url + path, headers={"If-None-Match": tag}) as answer:
                assert (answer.status, await answer.read()) == (304, b"")

    asyncio.run(run())


@pytest.mark.parametrize("path", ["/docs/swagger-ui.css", "/openapi.json"])
def test_file_is_compressed_for_those_that_take_it(path: str) -> None:
    """A client that does not gets the same, decompressed."""

    async def run() -> None:
        async with serve_gateway() as gateway:
            bodies = []
            for accepted in ("gzip, deflate, br", "identity", "gzip;q=0"):
                async with gateway.http.get(gateway.url + path, headers={"Accept-Encoding": accepted}) as answer:
                    assert answer.headers.get("content-encoding") == ("gzip" if accepted[-1] == "r" else None)
                    assert answer.headers["vary"] == "accept-encoding"
                    bodies.append(await answer.read())
            assert len(set(bodies)) == 1

    asyncio.run(run())


@pytest.mark.parametrize(
    ("accepted", "takes"),
    [("gzip", True), ("br, gzip;q=0.5", True), ("", False), ("gzip;q=0", False), ("gzip; q=0.00, br", False)],
)
def test_accept_encoding_is_read(accepted: str, takes: bool) -> None:
    """Quality 0 means no."""
    assert takes_gzip(accepted) is takes


def test_page_loads_its_files_below_the_path_at_which_it_is() -> None:
    """Behind a proxy's path, and where the URL ends in a slash."""

    async def run() -> None:
        async with serve_gateway() as gateway:
            for path in ("/docs", "/docs/"):
                async with gateway.http.get(gateway.url + path) as answer:
                    links = re.findall(r'(?:href|src)="([^"]+)"', await answer.text())
                found = {urljoin(BASE + path, link) for link in links}
                assert found == {
                    f"{BASE}/openapi.json",
                    f"{BASE}/console/icon.svg",
                    *(f"{BASE}/docs/{name}" for name in FILES),
                }

    asyncio.run(run())


@pytest.mark.parametrize("name", ["none.js", "engine.json", "SHA256SUMS", "LICENSE", "oauth2-redirect", "..%2fkeys.py"])
def test_page_has_no_other_file(name: str) -> None:
    """A name is looked up among the page's files, and is no path."""

    async def run() -> None:
        async with (
            serve_gateway(ClientRegistry(KEYS)) as gateway,
            gateway.http.get(f"{gateway.url}/docs/{name}") as answer,
        ):
            assert answer.status in {401, 404}

    asyncio.run(run())


def test_page_names_no_other_host_and_has_nothing_inline() -> None:
    """Our own files; Swagger UI's are held by their hashes and by the policy."""
    for name in ("index.html", "page.js", "page.css"):
        assert "http" not in (DIRECTORY / name).read_text(), name
    assert not re.search(r"<style|style=|\son\w+=|<script(?![^>]*src=)", (DIRECTORY / "index.html").read_text())
