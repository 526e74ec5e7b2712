"""One request to the engine in this container, for `Server.complete`: no web endpoint, no proxy token."""

from __future__ import annotations

import json
from typing import Any

import aiohttp


async def request(port: int, path: str, body: Any | None, key: str | None = None) -> tuple[int, Any]:
    """POST `body` as JSON to the engine's `path` (GET when it is None) and return status and parsed answer.

    An answer that is no JSON is returned as text. Cancelling this coroutine closes the connection, and then the engine
    stops generating.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = f"http://127.0.0.1:{port}/{path.lstrip('/')}"
    method = "GET" if body is None else "POST"
    timeout = aiohttp.ClientTimeout(total=None)  # Modal's own limit on the call is the limit
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.request(method, url, json=body, headers=headers) as answer,
    ):
        text = await answer.text()
        try:
            return answer.status, json.loads(text)
        except json.JSONDecodeError:
            return answer.status, text
