"""Websockets between a client and a container, as the ASGI messages in which the container gets and answers them.

Owns the translation. A connection is one input for as long as it lasts. The limits are those of Modal's guide: 2 MiB a
message, no compression (RFC 7692). Where it tells nothing, ASGI's rules hold: a close before the accept is a 403, and
an application that ends without a close leaves its client without one (1006).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import WSCloseCode, WSMsgType, web
from modal_proto import api_pb2 as pb

from . import web as http
from .calls import FunctionCall

MAX_MESSAGE_BYTES = 2 * 2**20


def is_asked_for(request: web.Request) -> bool:
    """Tell whether the request opens a websocket."""
    return request.headers.get("Upgrade", "").lower() == "websocket"


def is_well_formed(request: web.Request) -> bool:
    """Tell whether the handshake has all that it must have."""
    return _socket(_protocols(request)).can_prepare(request).ok


def scope(request: web.Request) -> dict[str, object]:
    """Describe the request as an ASGI application gets it; the handshake's own headers stay here."""
    described = http.scope(request) | {"type": "websocket", "scheme": "ws"}
    del described["method"]
    headers = [(name, value) for name, value in described["headers"] if not _is_of_handshake(name)]  # type: ignore[attr-defined]
    return described | {"headers": headers, "subprotocols": _protocols(request)}


class Connection:
    """A client's socket at one end, the streams of a call at the other."""

    def __init__(self, exchange: http.Exchange, call: FunctionCall) -> None:
        self._exchange, self._call = exchange, call
        self._client = _socket([])
        self._is_over = False

    def send_connect(self) -> None:
        """Tell the application that a client asks to be let in."""
        self._tell(pb.Asgi(websocket_connect=pb.Asgi.WebsocketConnect()))

    def send_disconnect(self) -> None:
        """Tell the application, once, how it ended; what that still has to say interests nobody."""
        if not self._is_over:
            self._is_over = True
            code = self._client.close_code or WSCloseCode.ABNORMAL_CLOSURE
            self._tell(pb.Asgi(websocket_disconnect=pb.Asgi.WebsocketDisconnect(code=code)))
            self._call.data_out.discard()

    async def pass_on(self, first: dict[str, Any], messages: AsyncIterator[dict[str, Any]]) -> web.StreamResponse:
        """Answer the handshake, then pass messages both ways until one of the two has closed."""
        if first["type"] != "websocket.accept":
            return web.Response(status=403)
        await self._accept(first)
        incoming = asyncio.ensure_future(self._receive())
        try:
            async for message in messages:
                if message["type"] == "websocket.close":
                    code, reason = message["code"], message["reason"]
                elif _size(message) > MAX_MESSAGE_BYTES:
                    code, reason = WSCloseCode.MESSAGE_TOO_BIG, ""
                else:
                    await self._send(message)
                    continue
                incoming.cancel()  # it would read the answer to the close
                await self._client.close(code=code, message=reason.encode())
                break
        finally:
            incoming.cancel()
        if not self._client.closed and self._exchange.request.transport is not None:
            self._exchange.request.transport.abort()
        return self._client

    async def _accept(self, message: dict[str, Any]) -> None:
        self._client = _socket([message["subprotocol"]] if message["subprotocol"] else [])
        headers = [(name.decode(), value.decode()) for name, value in message["headers"]]
        self._client.headers.extend([*headers, ("Modal-Function-Call-Id", self._call.id)])
        await self._client.prepare(self._exchange.request)
        self._exchange.status = self._client.status

    async def _send(self, message: dict[str, Any]) -> None:
        if message.get("text") is not None:
            await self._client.send_str(message["text"])
        else:
            await self._client.send_bytes(message["bytes"])

    async def _receive(self) -> None:
        async for message in self._client:
            await self._call.data_in.room()
            if message.type is WSMsgType.TEXT:
                received = {"text": message.data}
            elif message.type is WSMsgType.BINARY:
                received = {"bytes": message.data}
            else:
                continue  # an error, after which it ends
            if _size(received) > MAX_MESSAGE_BYTES:
                await self._client.close(code=WSCloseCode.MESSAGE_TOO_BIG)
            else:
                self._tell(pb.Asgi(websocket_receive=pb.Asgi.WebsocketReceive(**received)))
        self.send_disconnect()

    def _tell(self, message: pb.Asgi) -> None:
        self._call.data_in.put(http.chunk(message))


def _socket(protocols: list[str]) -> web.WebSocketResponse:
    # a message is measured once it is read: a connection that closes on unread bytes is reset, and its code is lost
    return web.WebSocketResponse(protocols=protocols, max_msg_size=2 * MAX_MESSAGE_BYTES, compress=False)


def _protocols(request: web.Request) -> list[str]:
    asked = request.headers.get("Sec-WebSocket-Protocol", "").split(",")
    return [name.strip() for name in asked if name.strip()]


def _size(message: dict[str, Any]) -> int:
    return len((message.get("text") or "").encode()) + len(message.get("bytes") or b"")


def _is_of_handshake(name: bytes) -> bool:
    return name == b"upgrade" or name.startswith(b"sec-websocket-")
