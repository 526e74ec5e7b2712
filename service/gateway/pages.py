"""Pages of long lists: the fields `limit` and `offset`, or `before` and `after`, of a query."""

from __future__ import annotations

from starlette.requests import Request

from service.in_engine.vllm_service.api_error import APIError


def number_of(request: Request, name: str) -> int | None:
    """Return a field of the query; None: it has none of that name.

    Raises:
        APIError: 400: it is no whole number.
    """
    text = request.query_params.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= 15):
        raise APIError(400, f"{name}='{text[:40]}' is no whole number. Write such as {name}=100.", param=name)
    return int(text)
