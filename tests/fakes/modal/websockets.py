"""The handshake of a websocket, as the ASGI messages in which a container gets and refuses it.

The service accepts no websocket, so a refused handshake is all that this plane passes on: 403 for a close before the
accept, as ASGI has it. An accepted one is answered 501.
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
    """Tell whether the handshake has all that it must have."""
    return web.WebSocketResponse().can_prepare(request).ok


def scope(request: web.Request) -> dict[str, object]:
    """Describe the request as an ASGI application gets it, without the headers of the handshake itself."""
    described = http.scope(request) | {"type": "websocket", "scheme": "ws", "subprotocols": []}
    del described["method"]
    headers = [(name, value) for name, value in described["headers"] if not _is_of_handshake(name)]  # type: ignore[attr-defined]
    return described | {"headers": headers}


def send_connect(call: FunctionCall) -> None:
    """Tell the application that a client asks for a websocket."""
    call.data_in.put(http.chunk(pb.Asgi(websocket_connect=pb.Asgi.WebsocketConnect())))


def send_disconnect(call: FunctionCall) -> None:
    """Tell the application that the client is gone, and drop what it still sends."""
    gone = pb.Asgi.WebsocketDisconnect(code=WSCloseCode.ABNORMAL_CLOSURE)
    call.data_in.put(http.chunk(pb.Asgi(websocket_disconnect=gone)))
    call.data_out.discard()


def answer(first: dict[str, Any]) -> web.Response:
    """Answer the handshake by the application's first message."""
    if first["type"] == "websocket.accept":
        return web.Response(status=501, text="modal-http: the modal plane for tests carries no websockets\n")
    return web.Response(status=403)


def _is_of_handshake(name: bytes) -> bool:
    return name == b"upgrade" or name.startswith(b"sec-websocket-")
