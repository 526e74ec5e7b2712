"""Modal's redirects: 303 after 150 s without an answer, which is then at another URL; and at once in a crash loop.

Containers that end before they are ready show as 303 too, each at once. Both are followed with a pause and a bound.
"""

from __future__ import annotations

import asyncio
import time
from urllib.parse import urljoin

from service.gateway.http_client.answer import Answer
from service.gateway.http_client.connections import Origin

SOON_S = 5.0  # an answer that comes sooner did not wait for anything
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0
MOST_AT_ONCE = 8  # 6 s of pauses


class RedirectError(Exception):
    """The answer is not to be had by following redirects; the message completes "Modal …"."""


class CrashLoopError(RedirectError):
    """Redirect after redirect came at once."""


class Redirects:
    """The redirects of one request.

    Args:
        url: Where the request was sent; no other host is followed to.
        limit_s: How long an answer may take.
    """

    def __init__(self, url: str, limit_s: float) -> None:
        self._url, self._origin, self._limit_s = url, Origin.of(url), limit_s
        self._began = self._asked_at = time.monotonic()
        self._at_once, self._pause_s = 0, _FIRST_PAUSE_S

    def target(self, answer: Answer) -> str:
        """Return where an answer of 303 points to, from the URL that was asked last.

        Raises:
            RedirectError: To another host.
        """
        self._url = urljoin(self._url, answer.header(b"location"))
        try:
            is_same = Origin.of(self._url) == self._origin
        except ValueError:
            is_same = False
        if not is_same:
            raise RedirectError("redirected this request to another host")
        return self._url

    async def pause(self) -> None:
        """Wait before the next request for the answer.

        Raises:
            CrashLoopError: Too many were answered at once, one after another.
            RedirectError: The answer has taken too long.
        """
        now = time.monotonic()
        if now - self._asked_at >= SOON_S:
            self._at_once, self._pause_s = 0, _FIRST_PAUSE_S
        self._at_once += 1
        if self._at_once > MOST_AT_ONCE:
            raise CrashLoopError(
                f"gave no answer {self._at_once} times at once, as it does while containers end before they are ready"
            )
        if now - self._began > self._limit_s:
            raise RedirectError(f"had no answer after {self._limit_s:.0f} s (SERVICE_REQUEST_TIMEOUT_S)")
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        self._asked_at = time.monotonic()
