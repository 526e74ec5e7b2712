"""Websocket handshakes, as the ASGI messages in which a container receives and refuses them.

The service accepts no websocket, so the plane only supports refused handshakes: a close before the accept is answered
403, as in ASGI. An accepted handshake is answered 501.
"""

from __future__ import annotations

from typing import Any

from aiohttp import WSCloseCode, web
from modal_proto import api_pb2 as pb

from . import web as http
from .calls import FunctionCall


def is_handshake(request: web.Request) -> bool:
    """Tell whether the request opens a websocket."""
    return request.headers.get("Upgrade", "").lower() == "websocket"


def is_well_formed(request: web.Request) -> bool:
    """Tell whether the handshake has all required headers."""
    return web.WebSocketResponse().can_prepare(request).ok


def scope(request: web.Request) -> dict[str, object]:
    """Return the ASGI scope of the request, without the headers of the handshake itself."""
    described = http.scope(request) | {"type": "websocket", "scheme": "ws", "subprotocols": []}
    del described["method"]
    headers = [(name, value) for name, value in described["headers"] if not _is_of_handshake(name)]  # type: ignore[attr-defined]
    return described | {"headers": headers}


def send_connect(call: FunctionCall) -> None:
    """Send the application a websocket's connect message."""
    call.data_in.put(http.chunk(pb.Asgi(websocket_connect=pb.Asgi.WebsocketConnect())))


def send_disconnect(call: FunctionCall) -> None:
    """Send the application a disconnect, and discard what it still sends."""
    disconnect = pb.Asgi.WebsocketDisconnect(code=WSCloseCode.ABNORMAL_CLOSURE)
    call.data_in.put(http.chunk(pb.Asgi(websocket_disconnect=disconnect)))
    call.data_out.discard()


def answer(first: dict[str, Any]) -> web.Response:
    """Return the response to the handshake for the application's first message."""
    if first["type"] == "websocket.accept":
        return web.Response(status=501, text="modal-http: the modal plane for tests carries no websockets\n")
    return web.Response(status=403)


def _is_of_handshake(name: bytes) -> bool:
    return name == b"upgrade" or name.startswith(b"sec-websocket-")
