"""A function that returns an ASGI application, as the service's gateway is one: app `sample-asgi`.

The application uses no framework, so tests see the ASGI messages themselves. Events are `TRACE {json}` lines, as in
`server`.
"""

import asyncio
import hashlib
import json
import os
import socket
import struct
import time
import urllib.request
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs

import modal

from sample.server import image, trace

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
PIECE = b"0123456789abcdef" * 1024  # 16 KiB

HELD = asyncio.Event()
IMPORTED_BY = os.environ.get("MODAL_TASK_ID")
app = modal.App("sample-asgi")


@app.function(
    image=image,
    secrets=[modal.Secret.from_name("sample-secret", required_keys=["TOKEN"])],
    enable_memory_snapshot=True,
    scaledown_window=int(os.environ.get("SAMPLE_SCALEDOWN_WINDOW", "60")),
    max_containers=1,
    timeout=60,
)
@modal.concurrent(max_inputs=1000)
@modal.asgi_app(requires_proxy_auth=os.environ.get("SAMPLE_AUTH") == "1")
def web() -> Callable[[Message, Receive, Send], Awaitable[None]]:
    """Return the application."""
    trace("web", imported_by=IMPORTED_BY, token=os.environ["TOKEN"])
    return application


async def application(scope: Message, receive: Receive, send: Send) -> None:
    """Answer a request by its path, or a lifespan message."""
    if scope["type"] == "lifespan":
        await _lifespan(scope, receive, send)
        return
    query = {name: values[0] for name, values in parse_qs(scope["query_string"].decode()).items()}
    await ROUTES[scope["path"]](scope, receive, send, query)


async def _lifespan(scope: Message, receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        trace(message["type"])
        scope["state"]["started"] = True
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def _health(scope: Message, receive: Receive, send: Send, query: Message) -> None:
    await _answer(send, {"started": scope["state"]["started"], "method": scope["method"]})


async def _silent(scope: Message, receive: Receive, send: Send, query: Message) -> None:
    """Send nothing for a while, and read the body only then."""
    await asyncio.sleep(float(query["s"]))
    await _answer(send, await _measured(receive))


async def _digest(scope: Message, receive: Receive, send: Send, query: Message) -> None:
    await _answer(send, await _measured(receive))


async def _echo(scope: Message, receive: Receive, send: Send, query: Message) -> None:
    """Send each piece of the body back before receiving the next one."""
    await send({"type": "http.response.start", "status": 201, "headers": [(b"x-sample", b"1"), (b"x-sample", b"2")]})
    while (message := await receive())["type"] == "http.request":
        more = message["more_body"]
        await send({"type": "http.response.body", "body": message["body"], "more_body": more})
        if not more:
            return


async def _slow(scope: Message, receive: Receive, send: Send, query: Message) -> None:
    """Stream numbers until the end or the client's disconnect."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    leaving = asyncio.ensure_future(_left(receive))
    for number in range(int(query["n"])):
        await send({"type": "http.response.body", "body": b"%d\n" % number, "more_body": True})
        await asyncio.wait([leaving], timeout=float(query["s"]))
        if leaving.done():
            trace("left", at=time.time(), after=number)
            return
    leaving.cancel()
    await send({"type": "http.response.body"})


async def _held(scope: Message, receive: Receive, send: Send, query: Message) -> None:
    """Send nothing until the client disconnects."""
    trace("held")
    HELD.set()
    await _left(receive)
    trace("left", at=time.time())


async def _flood(scope: Message, receive: Receive, send: Send, query: Message) -> None:
    """Send pieces as fast as they are read, and trace the count."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    leaving = asyncio.ensure_future(_left(receive))
    for number in range(int(query["n"])):
        await send({"type": "http.response.body", "body": PIECE, "more_body": True})
        if number % 64 == 0:
            trace("flood", sent=number + 1)
        if leaving.done():
            trace("left", at=time.time())
            return
    leaving.cancel()
    trace("flooded")
    await send({"type": "http.response.body"})


async def _cut(scope: Message, receive: Receive, send: Send, query: Message) -> None:
    """Raise in the middle of a response."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"so far", "more_body": True})
    raise ValueError("told to fail")


async def _fail(scope: Message, receive: Receive, send: Send, query: Message) -> None:
    raise ValueError("told to fail")


async def _pool(scope: Message, receive: Receive, send: Send, query: Message) -> None:
    """Return URL and statistics of a pool of another app."""
    instance = modal.Cls.from_name("sample", "Server")(model=query["model"])
    stats = await instance.serve.get_current_stats.aio()
    url = await instance.serve.get_web_url.aio()
    await _answer(send, {"url": url, "backlog": stats.backlog, "runners": stats.num_total_runners})


async def _missing(scope: Message, receive: Receive, send: Send, query: Message) -> None:
    """Look up an app that is not deployed."""
    try:
        await modal.Cls.from_name("missing", "Server").hydrate.aio()
    except modal.exception.NotFoundError as error:
        await _answer(send, {"error": str(error)})


async def _fetch(scope: Message, receive: Receive, send: Send, query: Message) -> None:
    """Forward the response of a URL as it arrives."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    with await asyncio.to_thread(urllib.request.urlopen, query["url"], timeout=30) as answer:
        while piece := await asyncio.to_thread(answer.read1):  # readline would treat a broken stream as a complete one
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body"})


async def _reset(scope: Message, receive: Receive, send: Send, query: Message) -> None:
    """Request `/held` of this application by its URL, and reset the connection once the request has arrived."""
    HELD.clear()
    _, writer = await asyncio.open_connection("127.0.0.1", int(query["port"]))
    writer.write(b"GET /held HTTP/1.1\r\nHost: here\r\n\r\n")
    await HELD.wait()
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    trace("reset", at=time.time())
    writer.transport.abort()
    await _answer(send, {})


async def _websocket(scope: Message, receive: Receive, send: Send, query: Message) -> None:
    """Refuse a handshake; with `accept` in the query, accept it and wait for the client to disconnect."""
    await receive()
    trace("websocket", headers=[name.decode() for name, _ in scope["headers"]], scheme=scope["scheme"], query=query)
    if query.get("accept"):
        await send({"type": "websocket.accept"})
        await receive()
    else:
        await send({"type": "websocket.close"})


ROUTES = {
    "/health": _health,
    "/silent": _silent,
    "/digest": _digest,
    "/echo": _echo,
    "/slow": _slow,
    "/held": _held,
    "/flood": _flood,
    "/cut": _cut,
    "/fail": _fail,
    "/pool": _pool,
    "/missing": _missing,
    "/fetch": _fetch,
    "/reset": _reset,
    "/websocket": _websocket,
}


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _measured(receive: Receive) -> Message:
    digest, size, largest, messages = hashlib.sha256(), 0, 0, 0
    while True:
        message = await receive()
        body = message["body"]
        digest.update(body)
        size, largest, messages = size + len(body), max(largest, len(body)), messages + 1
        if not message["more_body"]:
            return {"sha256": digest.hexdigest(), "size": size, "largest": largest, "messages": messages}


async def _answer(send: Send, value: Message) -> None:
    body = json.dumps(value).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
