"""One answer on its way from vLLM to the client: it ends well, or with an error in the shape of its route's protocol.

vLLM's own errors have integers as codes, Python's class names as types, and on some paths FastAPI's shape. They are
replaced here, as whole answers and as events in streams. All other bytes pass as they come: of a chunk in a stream only
its first bytes are compared.
"""

from __future__ import annotations

import functools
import logging

from vllm_service import engine_errors
from vllm_service.api_error import APIError, Message, Send
from vllm_service.http_contract import EVENT_STREAM, STREAM_HEADERS, request_id_of
from vllm_service.request_usage import RequestUsage
from vllm_service.stream_comments import StreamComments, comment
from vllm_service.usage_report import REPLICA_HEADER, USAGE_HEADER, EngineUsage

_LOGGER = logging.getLogger("vllm.vllm_service.answer")  # below vLLM's logger, the only one that has a handler
_KEPT, _LOGGED = 64 * 1024, 1000  # bytes of an error answer that are read, and that the log shows
_ERROR_EVENTS = (b'data: {"error"', b"event: error\n")  # vLLM sends each event as a message of its own


class Answer:
    """The answer to one request.

    Args:
        scope: The request's.
        send: Sends to the client.
        usage: What the request uses, which the answer is to tell; None: nobody asks.
        replica: Id of this replica, which the answer is to tell.

    Attributes:
        client_left: The client closed the connection; what vLLM sends from now on reaches nobody.
    """

    def __init__(
        self, scope: Message, send: Send, usage: RequestUsage | None = None, replica: bytes | None = None
    ) -> None:
        self.path: str = scope["path"]
        self._headers, self._to_client = scope["headers"], send
        self._begun = self._finished = False
        self._comments: StreamComments | None = None  # of a stream
        self._usage, self._replica = usage, replica
        self.client_left = False
        self._error_status = 0
        self._error_body = b""

    @functools.cached_property
    def request_id(self) -> str:
        """The request's id, for errors."""
        return request_id_of(self._headers)

    async def send(self, message: Message) -> None:
        """Pass on what vLLM sends, its errors reshaped."""
        if self._finished:  # an error has ended it
            return
        if message["type"] == "http.response.start":
            await self._start(message)
        elif self._error_status:
            await self._collect_error(message)
        elif self._comments and message.get("body", b"").startswith(_ERROR_EVENTS):
            await self._fail_as(engine_errors.from_event(self.path, message["body"]), message["body"])
        else:
            await self.pass_on(message)

    async def pass_on(self, message: Message) -> None:
        """Pass on a message as it is."""
        self._begun = True
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._finished = True
            if self._comments and self._usage and not message.get("body"):
                message = {**message, "body": self._report(self._usage).to_comment()}
        await (self._comments.send if self._comments else self._to_client)(message)

    async def fail(self, error: APIError) -> bool:
        """End with an error as far as what was sent allows; false: the connection must break off instead."""
        if self._finished:
            return True
        if self._begun and not self._comments:
            return False
        self._finished = True
        if self._comments:  # vLLM sends whole events, so this one does not interrupt another
            await self._comments.send({"type": "http.response.body", "body": error.event(self.path, self.request_id)})
        else:
            await error.send(self.path, self.request_id, self._to_client)
        return True

    def close(self) -> None:
        """Send nothing more."""
        if self._comments and not self._finished:  # the end of a stream stops them itself
            self._comments.stop()

    async def _start(self, message: Message) -> None:
        if message["status"] >= 400:
            self._error_status = message["status"]
            return
        headers = message["headers"]
        if dict(headers).get(b"content-type", b"").startswith(EVENT_STREAM.encode()):
            self._comments = StreamComments(self._to_client, self._comment)
            headers = [*headers, *STREAM_HEADERS]
        elif self._usage and not self.client_left:
            headers = [*headers, (USAGE_HEADER, self._report(self._usage).to_text())]
        if self._replica:
            headers = [*headers, (REPLICA_HEADER, self._replica)]
        await self.pass_on({**message, "headers": headers})

    def _report(self, usage: RequestUsage) -> EngineUsage:
        usage.is_reported = True
        return usage.report()

    async def _comment(self) -> None:
        text = comment(self.path, "waiting for the engine")
        await self._to_client({"type": "http.response.body", "body": text, "more_body": True})

    async def _collect_error(self, message: Message) -> None:
        self._error_body += message.get("body", b"")[: _KEPT - len(self._error_body)]
        if not message.get("more_body", False):
            await self._fail_as(
                engine_errors.from_answer(self.path, self._error_status, self._error_body), self._error_body
            )

    async def _fail_as(self, error: APIError, words: bytes) -> None:
        """End with what vLLM's error became; its words about a failure of its own are for the log alone."""
        if error.status >= 500:
            _LOGGER.error("request %s failed in vLLM: %s", self.request_id, words[:_LOGGED].decode(errors="replace"))
        await self.fail(error)
