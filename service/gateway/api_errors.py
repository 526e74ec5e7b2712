"""Errors that a request is answered with; `http_contract` has their shapes."""

from __future__ import annotations

from collections.abc import Mapping

from service.in_engine.vllm_service import http_contract
from service.in_engine.vllm_service.http_contract import ApiRoute


class APIError(Exception):
    """Ends a request with a status and a message for its client; the message holds no secret and no content.

    Args:
        status: HTTP status.
        message: What happened, the actual value, what was expected, the next step.
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

    def body(self, path: str) -> bytes:
        """Return the body of the answer to a request for `path`."""
        return http_contract.error_body(path, self._fields())

    def event(self, path: str) -> bytes:
        """Return the event that ends a stream of `path` whose headers were sent before; it carries the status."""
        return http_contract.error_event(path, {**self._fields(), "status": self.status})

    def _fields(self) -> dict[str, object]:
        return http_contract.error_fields(self.message, self.kind, self.code, self.param)


def find_route(method: str, path: str) -> ApiRoute:
    """Return the route of a request.

    Raises:
        APIError: 404 or 405: there is none.
    """
    routes = http_contract.routes_at(path)
    if not routes:
        raise APIError(404, http_contract.no_route(path), kind="not_found_error")
    allowed = dict(routes)
    if (get := routes.get("GET")) and (get.model_from is None or get.is_own_without_model):
        allowed["HEAD"] = get  # HEAD is not forwarded
    if method not in allowed:
        headers = {"Allow": ", ".join(sorted(allowed))}
        raise APIError(405, http_contract.not_allowed(method, path, routes), headers=headers)
    return allowed[method]


def unauthorized() -> APIError:
    """Return the error of a request without a valid key."""
    return APIError(
        401,
        "A valid API key is needed: send 'Authorization: Bearer <key>' (or 'x-api-key: <key>').",
        kind="authentication_error",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def unavailable(message: str, code: str, retry_after_s: float) -> APIError:
    """Return the error of a request that cannot be served now: 503, with the time after which to retry."""
    headers = {"Retry-After": str(round(retry_after_s))}
    return APIError(503, message, kind="server_error", code=code, headers=headers)
