"""Comments in silent streams: when they come, where they stand, and how they mix with the stream."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from vllm_service.api_error import Message
from vllm_service.stream_comments import StreamComments, comment

from tests.unit.virtual_time import run_in_virtual_time

INTERVAL_S = 0.05
EVENT = b"data: {}\n\n"


class Stream:
    """A stream with comments, and what its client has got."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.blocked = asyncio.Event()
        self.blocked.set()
        self.comments = StreamComments(self._send, self._send_comment, INTERVAL_S)

    async def _send(self, message: Message) -> None:
        await self.blocked.wait()
        self.sent.append(message["body"])

    async def _send_comment(self) -> None:
        await self._send({"body": b":\n\n"})

    async def send(self, body: bytes) -> None:
        """Pass a chunk on."""
        await self.comments.send({"type": "http.response.body", "body": body, "more_body": True})


def play(scene: Any) -> list[bytes]:
    """Play a scene with a stream, and return what its client got."""

    async def run() -> list[bytes]:
        stream = Stream()
        scene_: Coroutine[Any, Any, None] = scene(stream)
        await asyncio.wait_for(scene_, 10)
        stream.comments.stop()
        return stream.sent

    return run_in_virtual_time(run())


@pytest.mark.parametrize("before", [b"", EVENT, b"data: {}\r\n\r\n"])
def test_comments_come_while_a_stream_is_silent(before: bytes) -> None:
    """Before its first event as well as after any."""

    async def scene(stream: Stream) -> None:
        if before:
            await stream.send(before)
        await asyncio.sleep(2.5 * INTERVAL_S)

    sent = play(scene)
    assert sent[: len([before] * bool(before))] == [before] * bool(before)
    assert sent.count(b":\n\n") == 2


@pytest.mark.parametrize("cut", range(1, len(EVENT)))
def test_comments_never_stand_inside_an_event(cut: int) -> None:
    """A chunk that ends anywhere but at the end of an event is followed by its rest."""

    async def scene(stream: Stream) -> None:
        await stream.send(EVENT[:cut])
        await asyncio.sleep(2.5 * INTERVAL_S)
        await stream.send(EVENT[cut:])
        await asyncio.sleep(1.5 * INTERVAL_S)

    sent = play(scene)
    assert sent[:2] == [EVENT[:cut], EVENT[cut:]]
    assert set(sent[2:]) == {b":\n\n"}


def test_comments_do_not_come_while_a_stream_has_something_to_say() -> None:
    """Each chunk begins the wait again."""

    async def scene(stream: Stream) -> None:
        for _ in range(20):
            await stream.send(EVENT)
            await asyncio.sleep(INTERVAL_S / 4)

    assert play(scene) == [EVENT] * 20


def test_comments_do_not_overtake_a_chunk_that_a_slow_client_holds_up() -> None:
    """While a chunk waits for the client no comment begins, however long it takes."""

    async def scene(stream: Stream) -> None:
        stream.blocked.clear()
        sending = asyncio.ensure_future(stream.send(EVENT))
        await asyncio.sleep(3 * INTERVAL_S)
        stream.blocked.set()
        await sending

    assert play(scene) == [EVENT]


def test_comment_that_a_slow_client_holds_up_goes_before_the_next_chunk() -> None:
    """It is whole before the chunk begins."""

    async def scene(stream: Stream) -> None:
        stream.blocked.clear()
        await asyncio.sleep(1.5 * INTERVAL_S)
        sending = asyncio.ensure_future(stream.send(EVENT))
        await asyncio.sleep(INTERVAL_S)
        stream.blocked.set()
        await sending

    assert play(scene) == [b":\n\n", EVENT]


def test_comments_end_with_their_stream() -> None:
    """Nothing is left that would write into the next answer of the connection."""

    async def scene(stream: Stream) -> None:
        stream.comments.stop()
        await asyncio.sleep(2 * INTERVAL_S)

    assert play(scene) == []


def test_comment_of_anthropics_streams_is_their_ping() -> None:
    """Anthropic's clients know the event; readers of other streams skip a comment."""
    assert comment("/v1/messages", "waiting") == b': waiting\nevent: ping\ndata: {"type": "ping"}\n\n'
    assert comment("/v1/responses", "waiting") == comment("/v1/chat/completions", "waiting") == b": waiting\n\n"
