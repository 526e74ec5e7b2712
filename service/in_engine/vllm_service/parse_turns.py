"""Bodies that take vLLM's event loop long are parsed one at a time, with a rest after each: a share of time per client.

vLLM parses and renders a body in one go, for up to 0.8 s of 10,000 messages with five parts. Four connections that send
such bodies in a loop left another client's one-token request a turn of the loop between two of them, and it needs many:
it waited for 5 s and more. Here a client's next such body waits until the loop has been free for twice the time that
the last one took it. Clients take turns; one that has left is passed over. Other requests never wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec
from vllm_service import json_counts, request_counts
from vllm_service.client_turns import Turns, client

VALUES = 20_000  # from so many on a body has a turn: 0.05 s and more
MANY_TEXTS = 256  # the same, of prompts in one body: 1,024 take 0.2 s before the engine begins with the first
TEXT_BYTES = 64 * 1024  # the same, of text to tokenize: the answer lists each token, or vLLM looks at no length before
_TOKENIZING = ("/tokenize", "/detokenize", *request_counts.SCORED)
_REST = 2.0  # seconds for each second that a body took
_MOST_S = 5.0  # of a turn: what waits for an image or for its constraint does not hold up others
_NAMES = {name for names in request_counts.TEXTS.values() for name in names}
_FIELD = msgspec.Raw | msgspec.UnsetType
_PROMPTS = msgspec.json.Decoder(msgspec.defstruct("_Prompts", [(name, _FIELD, msgspec.UNSET) for name in _NAMES]))

_end_turn: contextvars.ContextVar[Callable[[], None] | None] = contextvars.ContextVar("_end_turn", default=None)


def end() -> None:
    """End the turn of the request that is being served, if it has one: it is parsed, and the engine begins."""
    if end_turn := _end_turn.get():
        end_turn()


def is_long(path: str, body: bytes) -> bool:
    """Tell whether a body takes vLLM's event loop long; the guard has seen that it is valid."""
    if path in _TOKENIZING and len(body) > TEXT_BYTES:
        return True
    if len(body) > VALUES and json_counts.separators(body) > VALUES:
        return True
    if path not in request_counts.TEXTS or body.count(b'"') + body.count(b"[") <= MANY_TEXTS:
        return False
    fields = _PROMPTS.decode(body)
    lists = [getattr(fields, name) for name in request_counts.TEXTS[path]]
    return any(
        json_counts.texts(texts, MANY_TEXTS)[0] > MANY_TEXTS
        for texts in lists
        if isinstance(texts, msgspec.Raw) and json_counts.is_list_of_texts(texts)
    )


class ParseTurns:
    """Turns at the event loop. Belongs to one.

    Args:
        most_s: Seconds of a turn.
    """

    def __init__(self, most_s: float = _MOST_S) -> None:
        self._most_s = most_s
        self._turns = Turns()
        self._resting: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """Wait for a turn, and have it until `end`, or until the end of the block."""
        turn = AsyncExitStack()
        await turn.enter_async_context(self._turns.take(client.get()))
        began, ended = time.thread_time(), False

        def end_turn() -> None:
            nonlocal ended
            if not ended:
                ended = True
                timer.cancel()
                rest = asyncio.ensure_future(_rest(turn, _REST * (time.thread_time() - began)))
                self._resting.add(rest)
                rest.add_done_callback(self._resting.discard)

        timer = asyncio.get_running_loop().call_later(self._most_s, end_turn)
        _end_turn.set(end_turn)
        try:
            yield
        finally:
            end_turn()


async def _rest(turn: AsyncExitStack, seconds: float) -> None:
    async with turn:
        with contextlib.suppress(asyncio.CancelledError):  # the loop ends
            await asyncio.sleep(seconds)
