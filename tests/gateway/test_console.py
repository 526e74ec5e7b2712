"""The console's page and files: open, strict headers, no host but its own, and complete."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from yarl import URL

from service.gateway.clients import ClientRegistry
from tests.gateway.upstream import KEYS, serve_gateway

CONSOLE = Path(__file__).parents[2] / "service" / "console"
FILES = sorted(path.name for path in CONSOLE.iterdir())
POLICY = {"default-src 'none'", "script-src 'self'", "style-src 'self'", "frame-ancestors 'none'"}
TEXTS = {path.name: path.read_text() for path in CONSOLE.iterdir()}


def test_console_page_and_files_need_no_key_and_have_strict_headers() -> None:
    """Nothing of another host, nothing inline, no frame around it, no guessing of types; and nothing wakes."""

    async def run() -> None:
        async with serve_gateway(ClientRegistry(KEYS)) as gateway:
            for path in ("/", *(f"/console/{name}" for name in FILES)):
                async with gateway.http.get(gateway.url + path) as answer:
                    assert answer.status == 200, path
                    policy = answer.headers["content-security-policy"].split("; ")
                    assert {
                        "default-src 'none'",
                        "script-src 'self'",
                        "style-src 'self'",
                        "frame-ancestors 'none'",
                    } <= {*policy}
                    assert "unsafe" not in " ".join(policy)
                    assert answer.headers["x-content-type-options"] == "nosniff"
                    assert answer.headers["x-frame-options"] == "DENY"
                    assert answer.headers["referrer-policy"] == "no-referrer"
                    tag = answer.headers["etag"]
                async with gateway.http.get(gateway.url + path, headers={"If-None-Match": tag}) as answer:
                    assert (answer.status, await answer.read()) == (304, b"")
            assert all(pool.wakes == 0 for pool in gateway.pools.values())

    asyncio.run(run())


@pytest.mark.parametrize(
    "name", ["none.js", "%2e%2e", "__init__.py", "open.html.js", "index.HTML", "..%2f..%2fkeys.py"]
)
def test_console_has_no_other_file(name: str) -> None:
    """A name is looked up among the page's files, and is no path."""

    async def run() -> None:
        async with serve_gateway(ClientRegistry(KEYS)) as gateway:
            url = URL(f"{gateway.url}/console/{name}", encoded=True)  # as it is: a client would resolve the dots
            async with gateway.http.get(url) as answer:
                assert answer.status in {401, 404}
                assert b"import" not in await answer.read()

    asyncio.run(run())


def test_console_page_asks_for_a_key_only_where_one_is_needed() -> None:
    """Without keys there is nothing to sign in with."""

    async def run(clients: ClientRegistry) -> bytes:
        async with serve_gateway(clients) as gateway, gateway.http.get(gateway.url + "/") as answer:
            return await answer.read()

    assert b'data-key="needed"' in asyncio.run(run(ClientRegistry(KEYS)))
    assert b'data-key="none"' in asyncio.run(run(ClientRegistry({})))


def test_console_names_no_other_host_and_has_nothing_inline() -> None:
    """The one URL in its files is the name of SVG's namespace."""
    for name, text in TEXTS.items():
        assert set(re.findall(r"https?://[\w./]+", text)) <= {"http://www.w3.org/2000/svg"}, name
    page = TEXTS["index.html"]
    assert not re.search(r"<style|style=|\son\w+=|<script(?![^>]*src=)", page)


def test_console_never_parses_text_as_html() -> None:
    """What comes from models, keys and requests becomes text nodes: no sink of HTML or code is in any file."""
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|srcdoc|DOMParser|javascript:"
    for name, text in TEXTS.items():
        assert not re.search(sinks, text), name


def test_console_imports_files_that_are_there() -> None:
    """There is no build step that would notice."""
    for name, text in TEXTS.items():
        for imported in re.findall(r'from "\./([\w.-]+)"|(?:href|src)="/console/([\w.-]+)"', text):
            assert "".join(imported) in FILES, f"{name}: {imported}"


def test_console_is_small() -> None:
    """A newcomer finds each tab's file; the whole page is less than a photograph."""
    assert {"models.js", "playground.js", "requests.js", "usage.js", "keys.js"} <= {*FILES}
    assert sum(len(text.encode()) for text in TEXTS.values()) <= 100_000
    assert all(len(text.splitlines()) <= 300 for text in TEXTS.values())
