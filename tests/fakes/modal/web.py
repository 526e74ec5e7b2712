"""Translates between HTTP and the ASGI messages in which a container receives and answers a web request.

Streams both bodies. Decides nothing: `web_endpoints` authenticates and routes requests.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from modal._serialization import deserialize_data_format
from modal_proto import api_pb2 as pb

from .calls import FunctionCall

CLIENT_LEFT = 499
HOP_BY_HOP = (b"transfer-encoding", b"connection", b"keep-alive")


@dataclass
class Exchange:
    """A request and the status of its response; CLIENT_LEFT until the response has been sent."""

    request: web.Request
    status: int = CLIENT_LEFT


def scope(request: web.Request) -> dict[str, object]:
    """Return the ASGI scope of the request."""
    headers = [(name.lower().encode(), value.encode()) for name, value in request.headers.items()]
    return {
        "type": "http",
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "query_string": request.query_string.encode(),
        "headers": [(name, value) for name, value in headers if name not in HOP_BY_HOP],
        "client": ("127.0.0.1", 1),
    }


async def send_body(request: web.Request, call: FunctionCall) -> None:
    """Forward the body as it arrives; the container waits 5 s for the first message, so an empty one is sent first."""
    if request.can_read_body:
        call.data_in.put(chunk(pb.Asgi(http_request=pb.Asgi.HttpRequest(body=b"", more_body=True))))
        async for piece in request.content.iter_any():
            await call.data_in.room()
            call.data_in.put(chunk(pb.Asgi(http_request=pb.Asgi.HttpRequest(body=piece, more_body=True))))
    call.data_in.put(chunk(pb.Asgi(http_request=pb.Asgi.HttpRequest(body=b"", more_body=False))))


def send_disconnect(call: FunctionCall) -> None:
    """Send the application a disconnect, and discard what it still sends."""
    call.data_in.put(chunk(pb.Asgi(http_disconnect=pb.Asgi.HttpDisconnect())))
    call.data_out.discard()


async def responses(call: FunctionCall) -> AsyncIterator[dict[str, Any]]:
    """Yield the ASGI messages of the response until the container has sent the last one, or dies."""
    chunks = call.data_out.after()
    while True:
        following = asyncio.ensure_future(anext(chunks))
        finished = asyncio.ensure_future(_settled(call))
        try:
            await asyncio.wait([following, finished], return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                return
            yield deserialize_data_format(following.result().data, pb.DATA_FORMAT_ASGI, None)
        finally:
            for waiting in (following, finished):
                waiting.cancel()
                with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
                    await waiting


async def pass_on(
    exchange: Exchange, call: FunctionCall, start: dict[str, Any], messages: AsyncIterator[dict[str, Any]]
) -> web.StreamResponse:
    """Stream the response.

    The status is recorded before the last byte is written, since a client may close once it has the whole body.
    """
    response = _start(start, call)
    await response.prepare(exchange.request)
    left = response.content_length
    async for message in messages:
        body = message.get("body", b"")
        left = None if left is None else left - len(body)
        is_last = not message.get("more_body")
        if is_last or left == 0:
            exchange.status = response.status
        if body:
            await response.write(body)
        if is_last:
            await response.write_eof()
            return response
    if exchange.request.transport is not None:  # the container died: the client must not see a complete response
        exchange.request.transport.abort()
    return response


def chunk(message: pb.Asgi) -> pb.DataChunk:
    """Wrap a message for a call's streams."""
    return pb.DataChunk(data_format=pb.DATA_FORMAT_ASGI, data=message.SerializeToString())


def _start(message: dict[str, Any], call: FunctionCall) -> web.StreamResponse:
    response = web.StreamResponse(status=message["status"], headers={"Modal-Function-Call-Id": call.id})
    for name, value in message.get("headers", []):
        if name.lower() not in HOP_BY_HOP:
            response.headers.add(name.decode(), value.decode())
    return response


async def _settled(call: FunctionCall) -> None:
    while not call.outputs:
        await call.changed.wait()
