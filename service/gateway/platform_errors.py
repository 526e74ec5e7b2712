"""The errors of requests that Modal's proxy, not an engine, has answered."""

from __future__ import annotations

from service.gateway.http_client.answer import Answer
from service.gateway.redirects import CrashLoopError, RedirectError
from service.gateway.upstream import retry_after
from service.in_engine.vllm_service.api_error import APIError

_RETRY_S = 5.0  # where Modal does not say when to retry


def of_limit(answer: Answer, model: str) -> APIError | None:
    """Return the error of an answer by which Modal tells a limit of its own; None: it tells none."""
    wait_s = retry_after(answer) or _RETRY_S
    if answer.status == 429:
        message = f"Modal takes no further requests of this workspace for now. Try again in {wait_s:.0f} s."
        return APIError(429, message, code="platform_rate_limited", retry_after_s=wait_s)
    if answer.status == 408:
        message = f"Modal dropped this request to '{model}': it expired or was cancelled there. Send it again."
        return APIError(504, message, code="platform_timeout", retry_after_s=wait_s)
    return None


def of_redirect(error: RedirectError, model: str, location: str) -> APIError:
    """Return the error of a request whose redirects led to no answer; it is not sent again, since it was queued."""
    message = f"Modal {error}. The model is '{model}' on {location}."
    if isinstance(error, CrashLoopError):
        return APIError(503, f"{message} The log of its app has the reason.", code="model_failed")
    return APIError(502, message, code="platform_error")
