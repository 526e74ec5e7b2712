"""The page `/docs`, which is Swagger UI, and the OpenAPI document that it shows. Both need no key, and hold no data."""

from __future__ import annotations

import asyncio
import functools
import gzip

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.gateway import openapi
from service.gateway.clients import ClientRegistry
from service.gateway.static_files import StaticFile, read_directory
from service.gateway.threads import in_thread
from service.in_engine.vllm_service.api_error import APIError
from service.in_engine.vllm_service.http_contract import JSON

_PAGE, _PAGE_AT_SLASH = "index.html", "slash.html"  # of the second there is no file


def routes(clients: ClientRegistry) -> list[Route]:
    """Return the routes as Starlette has them.

    Args:
        clients: Whether they need a key is what the document says.
    """
    turn = asyncio.Lock()  # the document is made once, whoever asks for it meanwhile

    async def page(request: Request) -> Response:
        ends_in_slash = request.scope.get("raw_path", b"").endswith(b"/")
        return await _files()[_PAGE_AT_SLASH if ends_in_slash else _PAGE].answer(request)

    async def file(request: Request) -> Response:
        name = request.path_params["file"]
        if found := _files().get(name):
            return await found.answer(request)
        raise APIError(404, f"The page /docs has no file '{name[:80]}'.")

    async def document(request: Request) -> Response:
        async with turn:
            described = await in_thread(lambda: _document(clients.needs_key))
        return await described.answer(request)

    return [Route("/docs", page), Route("/docs/{file}", file), Route("/openapi.json", document)]


# Read and made when they are first asked for, so that a gateway at rest has neither in memory.
@functools.cache
def _files() -> dict[str, StaticFile]:
    found = read_directory(openapi.DIRECTORY)
    page = found[_PAGE]  # its URLs are relative, for a gateway behind a path of a proxy
    content = page.content.replace(b'"docs/', b'"')
    return {**found, _PAGE_AT_SLASH: StaticFile.of(content, page.media_type)}


@functools.cache
def _document(needs_key: bool) -> StaticFile:
    return StaticFile.of(gzip.compress(openapi.document(needs_key=needs_key), mtime=0), JSON, is_gzipped=True)
