"""The shapes of errors: OpenAI's, whole and inside a stream; Anthropic's inside a stream of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping

JSON = "application/json"


class Refusal(Exception):  # noqa: N818 - it is an answer, and most are the client's doing
    """A request that ends here, with a status and a sentence for its client; never a secret or content in it.

    Args:
        status: HTTP status.
        message: What, the actual value, what was expected, the next step.
        kind: OpenAI's `type` of the error.
        code: OpenAI's `code`, a word that programs can test.
        param: The field of the body that is at fault.
        headers: Further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param
        self.headers = dict(headers or {})

    def body(self, path: str = "") -> bytes:
        """Return the body of the answer; Anthropic's, for a path of theirs, has one field more."""
        anthropic = {"type": "error"} if path.startswith("/v1/messages") else {}
        return json.dumps({**anthropic, "error": self._fields()}).encode()

    def event(self, path: str) -> bytes:
        """Return the server-sent event that ends a stream whose headers are long gone; it keeps the status."""
        fields = {**self._fields(), "status": self.status}
        if path == "/v1/messages":
            return b"event: error\ndata: " + json.dumps({"type": "error", "error": fields}).encode() + b"\n\n"
        if path == "/v1/responses":
            return b"event: error\ndata: " + json.dumps({**fields, "type": "error", "error": fields}).encode() + b"\n\n"
        return b"data: " + json.dumps({"error": fields}).encode() + b"\n\ndata: [DONE]\n\n"

    def _fields(self) -> dict[str, object]:
        return {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}


def unauthorized() -> Refusal:
    """Return the answer to a request without a valid key."""
    return Refusal(
        401,
        "A valid API key is needed: send 'Authorization: Bearer <key>' (or 'x-api-key: <key>').",
        kind="authentication_error",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def unavailable(message: str, code: str, retry_after_s: float) -> Refusal:
    """Return the answer to a request that cannot be served now: 503, and when to come again."""
    headers = {"Retry-After": str(round(retry_after_s))}
    return Refusal(503, message, kind="server_error", code=code, headers=headers)
