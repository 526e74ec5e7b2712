"""Comments in streams that are silent: proxies close a connection on which nothing comes for a minute.

nginx and AWS's load balancers do it after 60 s, Cloudflare after 100 s. Clients ignore comments, of which a reader that
counts them (go-openai gives up after 300 empty lines) must not get more than it needs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from .api_error import Message, Send
from .http_contract import Protocol, protocol_of

INTERVAL_S = 15.0
_TICKS = 30  # parts of an interval: a comment may come so much later
_BORDERS = (b"\n\n", b"\r\n\r\n")  # the empty line that ends an event


def comment(path: str, text: str) -> bytes:
    """Return a comment in a stream of `path`; in Anthropic's with their `ping`, which their clients know."""
    ping = '\nevent: ping\ndata: {"type": "ping"}' if protocol_of(path) is Protocol.ANTHROPIC else ""
    return f": {text}{ping}\n\n".encode()


class _Timer:
    """One timer for all streams of an event loop with the same interval: one for each takes 3 us of a request.

    Args:
        loop: The event loop.
        interval_s: How long a stream may be silent.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, interval_s: float) -> None:
        self.loop, self._period_s = loop, interval_s / _TICKS
        self._streams: set[StreamComments] = set()
        self._is_set = False

    def add(self, stream: StreamComments) -> None:
        """Begin to call a stream's `tick`."""
        self._streams.add(stream)
        if not self._is_set:
            self._is_set = True
            self.loop.call_later(self._period_s, self._fire)

    def discard(self, stream: StreamComments) -> None:
        """Call it no more."""
        self._streams.discard(stream)

    def _fire(self) -> None:
        for stream in self._streams:
            stream.tick()
        self._is_set = bool(self._streams)
        if self._is_set:
            self.loop.call_later(self._period_s, self._fire)


_timers: dict[float, _Timer] = {}  # by interval


class StreamComments:
    """Passes a stream on, and sends a comment whenever nothing was sent for a while, never inside an event.

    Args:
        send: Sends to the client.
        send_comment: Sends a comment to the client.
        interval_s: How long a stream may be silent.
    """

    def __init__(self, send: Send, send_comment: Callable[[], Awaitable[None]], interval_s: float = INTERVAL_S) -> None:
        self._send, self._send_comment = send, send_comment
        loop, timer = asyncio.get_running_loop(), _timers.get(interval_s)
        if timer is None or timer.loop is not loop:
            timer = _timers[interval_s] = _Timer(loop, interval_s)
        self._timer = timer
        self._silent, self._sending = 0, False
        self._tail = b""
        self._commenting: asyncio.Task[None] | None = None
        timer.add(self)

    async def send(self, message: Message) -> None:
        """Pass a message on, after the comment that is just being sent; the last one stops the comments."""
        if self._commenting:
            await self.finish_comment()
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.stop()
        self._sending = True
        await self._send(message)
        self._sending = False
        if body := message.get("body", b""):
            self._tail = body[-4:] if len(body) >= 4 else (self._tail + body)[-4:]
        self._silent = 0

    def pass_now(self, body: bytes, write_now: Callable[[bytes], bool]) -> bool:
        """Pass a piece on at once; false: `send` must, since it has to wait for the client or for a comment."""
        if self._commenting or self._sending or not write_now(body):
            return False
        self._tail = body[-4:] if len(body) >= 4 else (self._tail + body)[-4:]
        self._silent = 0
        return True

    @property
    def ends_event(self) -> bool:
        """Whether what was sent so far ends with an event."""
        return not self._tail or self._tail.endswith(_BORDERS)

    async def finish_comment(self) -> None:
        """Wait until the comment that is just being sent is whole."""
        if self._commenting:
            await self._commenting

    def stop(self) -> None:
        """Send no more comments."""
        self._timer.discard(self)
        if self._commenting:
            self._commenting.cancel()

    def tick(self) -> None:
        """Count a part of the interval in which nothing was sent; begin a comment when it is over."""
        self._silent += 1
        if self._silent > _TICKS and self.ends_event and not self._sending and not self._commenting:
            self._commenting = self._timer.loop.create_task(self._comment(), name="comment in a stream")

    async def _comment(self) -> None:
        try:
            with contextlib.suppress(OSError):  # the client has left, which the stream itself will notice
                await self._send_comment()
        finally:
            self._silent, self._commenting = 0, None
