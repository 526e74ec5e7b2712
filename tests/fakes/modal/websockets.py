"""Websockets between a client and a container, as the ASGI messages in which the container gets and answers them.

Owns the translation. A connection is one input for as long as it lasts. Where Modal's client does not tell what Modal's
front does, ASGI's rules hold: a close before the accept is a 403, and an application that ends without a close leaves
its client without one (1006).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import WSMsgType, web
from modal_proto import api_pb2 as pb

from . import web as http
from .calls import FunctionCall

ABNORMAL_CLOSURE = 1006


def is_asked_for(request: web.Request) -> bool:
    """Tell whether the request opens a websocket."""
    return request.headers.get("Upgrade", "").lower() == "websocket"


def scope(request: web.Request) -> dict[str, object]:
    """Describe the request as an ASGI application gets it; the handshake's own headers stay here."""
    described = http.scope(request) | {"type": "websocket", "scheme": "ws"}
    del described["method"]
    headers = [(name, value) for name, value in described["headers"] if not _is_of_handshake(name)]  # type: ignore[attr-defined]
    asked = request.headers.get("Sec-WebSocket-Protocol", "").split(",")
    return described | {"headers": headers, "subprotocols": [name.strip() for name in asked if name.strip()]}


def send_connect(call: FunctionCall) -> None:
    """Tell the application that a client asks to be let in."""
    call.data_in.put(http.chunk(pb.Asgi(websocket_connect=pb.Asgi.WebsocketConnect())))


def send_disconnect(call: FunctionCall, code: int = ABNORMAL_CLOSURE) -> None:
    """Tell the application that the client is gone."""
    call.data_in.put(http.chunk(pb.Asgi(websocket_disconnect=pb.Asgi.WebsocketDisconnect(code=code))))


async def pass_on(
    exchange: http.Exchange, call: FunctionCall, first: dict[str, Any], messages: AsyncIterator[dict[str, Any]]
) -> web.StreamResponse:
    """Answer the handshake, then pass messages both ways until one of the two has closed."""
    if first["type"] != "websocket.accept":
        return web.Response(status=403)
    protocols = [first["subprotocol"]] if first.get("subprotocol") else []
    client = web.WebSocketResponse(protocols=protocols)
    client.headers["Modal-Function-Call-Id"] = call.id
    await client.prepare(exchange.request)
    exchange.status = client.status
    incoming = asyncio.ensure_future(_receive(client, call))
    try:
        async for message in messages:
            if message["type"] == "websocket.close":
                incoming.cancel()  # it would read the answer to the close
                await client.close(code=message["code"], message=message["reason"].encode())
            elif message.get("text") is not None:
                await client.send_str(message["text"])
            else:
                await client.send_bytes(message["bytes"])
    finally:
        incoming.cancel()
    if not client.closed and exchange.request.transport is not None:
        exchange.request.transport.abort()
    return client


async def _receive(client: web.WebSocketResponse, call: FunctionCall) -> None:
    async for message in client:
        await call.data_in.room()
        if message.type is WSMsgType.TEXT:
            call.data_in.put(http.chunk(pb.Asgi(websocket_receive=pb.Asgi.WebsocketReceive(text=message.data))))
        elif message.type is WSMsgType.BINARY:
            call.data_in.put(http.chunk(pb.Asgi(websocket_receive=pb.Asgi.WebsocketReceive(bytes=message.data))))
    send_disconnect(call, client.close_code or ABNORMAL_CLOSURE)


def _is_of_handshake(name: bytes) -> bool:
    return name == b"upgrade" or name.startswith(b"sec-websocket-")
