"""The console at `/`: a page and its files, which are package data. What the page shows it reads with a key."""

from __future__ import annotations

import functools
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.gateway.clients import ClientRegistry
from service.gateway.static_files import StaticFile, read_directory
from service.in_engine.vllm_service.api_error import APIError

_DIRECTORY = Path(__file__).parents[1] / "console"
_PAGE, _PAGE_WITHOUT_KEY = "index.html", "open.html"  # of the second there is no file
_KEY_NEEDED, _NO_KEY = b'data-key="needed"', b'data-key="none"'


def routes(clients: ClientRegistry) -> list[Route]:
    """Return the routes as Starlette has them.

    Args:
        clients: Whether they need a key is what the page shows a form for.
    """

    async def page(request: Request) -> Response:
        return await _files()[_PAGE if clients.needs_key else _PAGE_WITHOUT_KEY].answer(request)

    async def file(request: Request) -> Response:
        name = request.path_params["file"]
        if found := _files().get(name):
            return await found.answer(request)
        raise APIError(404, f"The console has no file '{name[:80]}'. Its page is at /.")

    return [Route("/", page), Route("/console/{file}", file)]


@functools.cache
def _files() -> dict[str, StaticFile]:
    """Return all files, read once: there are few, and they are small."""
    found = read_directory(_DIRECTORY)
    page = found[_PAGE]
    content = page.content.replace(_KEY_NEEDED, _NO_KEY)
    return {**found, _PAGE_WITHOUT_KEY: StaticFile.of(content, page.media_type)}
