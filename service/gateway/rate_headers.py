"""The headers that tell a client what is left of a limit of a minute, as OpenAI's and Anthropic's APIs have them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

from service.in_engine.vllm_service.http_contract import Protocol
from service.usage.limits import Window, utc_text

Headers = list[tuple[bytes, bytes]]


class RateHeaders:
    """The headers of one limit; what never changes of them is made once, since every answer has them.

    Args:
        what: `requests` or `tokens`.
        most: The limit.
        window: What was used of it.
        wall_clock: Seconds since 1970.
    """

    def __init__(self, what: str, most: int, window: Window, wall_clock: Callable[[], float]) -> None:
        self._most, self._window, self._wall_clock = most, window, wall_clock
        limit = b"%d" % most
        self._openai, self._anthropic = (
            ((f"{begin}limit{end}".encode(), limit), f"{begin}remaining{end}".encode(), f"{begin}reset{end}".encode())
            for begin, end in (("x-ratelimit-", f"-{what}"), (f"anthropic-ratelimit-{what}-", ""))
        )

    def of_answer(self, protocol: Protocol, reserved: int) -> Headers:
        """Return them as they are now.

        Args:
            protocol: The route's.
            reserved: What running requests are estimated to use.
        """
        used, reset_s = self._window.state()
        left = self._most - used - reserved
        if protocol is Protocol.ANTHROPIC:
            limit, remaining, reset = self._anthropic
            resets = utc_text(math.ceil(self._wall_clock() + reset_s)).encode()
        else:
            limit, remaining, reset = self._openai
            resets = _whole_seconds(math.ceil(reset_s)) if reset_s >= 1 else b"%dms" % math.ceil(reset_s * 1000)
        return [limit, (remaining, b"%d" % left if left > 0 else b"0"), (reset, resets)]


@lru_cache(128)
def _whole_seconds(seconds: int) -> bytes:
    """Return a duration as OpenAI's headers have it: 6s, 1m0s."""
    minutes, rest = divmod(seconds, 60)
    return b"%dm%ds" % (minutes, rest) if minutes else b"%ds" % rest
