"""A request's body as it comes to the engine, with the limit of its route."""

from __future__ import annotations

import codecs

from vllm_service import api_error
from vllm_service.answer import Answer
from vllm_service.api_error import Message, Receive


class LimitedBody:
    """Counts the bytes of a body as they arrive, and ends the request with 413 once they exceed the limit."""

    def __init__(self, receive: Receive, answer: Answer, limit: int) -> None:
        self._receive, self._answer, self._limit = receive, answer, limit
        self._seen, self._refused = 0, False

    async def receive(self) -> Message:
        """Return the next piece, without a byte order mark; a disconnect in place of what is over the limit."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._answer.client_left = True
        if not self._seen and message.get("body", b"").startswith(codecs.BOM_UTF8):  # which vLLM's parser refuses
            message = {**message, "body": message["body"][len(codecs.BOM_UTF8) :]}
        self._seen += len(message.get("body", b""))
        if self._seen > self._limit and not self._refused:
            self._refused = True
            await self._answer.fail(api_error.too_large(self._limit))
        return {"type": "http.disconnect"} if self._refused else message

    async def read(self) -> bytes | None:
        """Return the whole body; None when it was refused or the client left."""
        pieces, more = [], True
        while more:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                return None
            pieces.append(message.get("body", b""))
            more = message.get("more_body", False)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)
