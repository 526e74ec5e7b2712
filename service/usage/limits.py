"""What an API client may use: its limits, and how much of them it has used. It knows no request and no answer."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

from service.errors import UsageError

MINUTE_S = 60.0
_BUCKET_S = 0.5  # what is added within it is one entry of a window, so that a window has at most 121
_SPAN = re.compile(r"(\d{1,6})([smhd])")
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class KeyLimits(BaseModel):
    """The limits of one API client; a limit that is left out does not apply.

    Attributes:
        models: Names of the models that it may use.
        tokens_per_minute: Of prompts and answers together.
        tokens_per_day: Likewise, of a day in UTC.
        dollars_per_month: What it may cost in a calendar month in UTC.
        concurrency: Requests at the same time.
        expires: When its keys end: a date, whose beginning in UTC is meant, or a time.
        admin: It may read all counters and usage, and change keys and limits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    models: list[str] | None = None
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)
    tokens_per_day: int | None = Field(None, ge=1)
    dollars_per_month: float | None = Field(None, gt=0, allow_inf_nan=False)
    concurrency: int | None = Field(None, ge=1)
    expires: str | None = None
    admin: bool = False

    @field_validator("expires")
    @classmethod
    def _expires_is_a_time(cls, text: str | None) -> str | None:
        if text is not None:
            parse_time(text)
        return text

    @property
    def expires_at(self) -> float | None:
        """When its keys end, in seconds since 1970."""
        return None if self.expires is None else parse_time(self.expires)

    @property
    def counts_tokens(self) -> bool:
        """Whether the tokens of its requests must be known."""
        return bool(self.tokens_per_minute or self.tokens_per_day)

    def with_changes(self, **changes: object) -> Self:
        """Return these limits with some of them changed; None and 0 lift a limit.

        Raises:
            pydantic.ValidationError: A value is wrong.
        """
        lifted = {
            name: None if value == 0 and not isinstance(value, bool) else value for name, value in changes.items()
        }
        return self.model_validate(self.model_dump() | lifted)


NO_LIMITS = KeyLimits()


def parse_time(text: str) -> float:
    """Return a date or time as seconds since 1970; without an offset it is UTC.

    Raises:
        UsageError: It is none.
    """
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise UsageError(
            f"'{text[:40]}' is no date or time.", hint="Write 2027-01-31 or 2027-01-31T12:00:00Z."
        ) from None


def parse_span(text: str) -> int:
    """Return the seconds of a span such as 90s, 30m, 24h or 7d.

    Raises:
        UsageError: It is none.
    """
    if found := _SPAN.fullmatch(text):
        return int(found[1]) * _UNITS_S[found[2]]
    if text == "0":
        return 0
    raise UsageError(f"'{text[:40]}' is no span of time.", hint="Write such as 30m, 24h or 7d.")


def utc_text(at: float) -> str:
    """Return a time as people and programs read it: `2027-01-31T12:00:00Z`."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Window:
    """Sums what was used within the last minute.

    Args:
        clock: Seconds that never run backwards.
    """

    __slots__ = ("_clock", "_entries", "_used")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # [begin, end, amount] of what was added within half a second; made when needed: a deque takes 700 bytes
        self._entries: deque[list[float]] | tuple[()] = ()
        self._used: float = 0

    def add(self, amount: float) -> None:
        """Count an amount as used now."""
        now = self._clock()
        if self._entries and now - self._entries[-1][0] < _BUCKET_S:
            self._entries[-1][1] = now
            self._entries[-1][2] += amount
        else:
            self._entries = self._entries or deque()
            self._entries.append([now, now, amount])
        self._used += amount

    def used(self) -> float:
        """Return what was used within the last minute."""
        entries = self._entries
        if entries and entries[0][1] > self._clock() - MINUTE_S:  # nothing is older
            return self._used
        return self.state()[0]

    def state(self) -> tuple[float, float]:
        """Return what was used within the last minute, and in how many seconds nothing of it counts any more."""
        if not self._entries:
            return 0, 0.0
        oldest = self._clock() - MINUTE_S
        while self._entries and self._entries[0][1] <= oldest:
            self._used -= self._entries.popleft()[2]
        return self._used, self._entries[-1][1] - oldest if self._entries else 0.0

    def wait_s(self, excess: float) -> float:
        """Return in how many seconds at least `excess` of what was used no longer counts."""
        for _, end, amount in self._entries:
            excess -= amount
            if excess <= 0:
                return max(0.0, end + MINUTE_S - self._clock())
        return MINUTE_S


class PeriodTotal:
    """Sums what was used in the current day or month, in UTC. A clock that is set back costs nothing but the sum.

    Args:
        begin: Returns the beginning of the period that a time is in.
        end: Returns its end.
        clock: Seconds since 1970.
    """

    __slots__ = ("_begin", "_clock", "_end", "_ends_at", "_period", "_used")

    def __init__(
        self, begin: Callable[[float], float], end: Callable[[float], float], clock: Callable[[], float]
    ) -> None:
        self._begin, self._end, self._clock = begin, end, clock
        self._period = self._ends_at = self._used = 0.0

    def add(self, amount: float) -> None:
        """Count an amount as used now."""
        self._used = self.used() + amount

    def used(self) -> float:
        """Return what was used in the period that is now."""
        now = self._clock()
        if not self._period <= now < self._ends_at:
            self._period, self._ends_at, self._used = self._begin(now), self._end(now), 0.0
        return self._used

    def observe(self, period: float, amount: float) -> None:
        """Take what the ledger has for a period, which is more where other processes serve the same client."""
        used = self.used()
        if period == self._period:
            self._used = max(used, amount)


def day_begin(at: float) -> float:
    """Return the beginning of the day in UTC that a time is in."""
    return at - at % 86400


def month_begin(at: float) -> float:
    """Return the beginning of the month in UTC that a time is in."""
    return datetime.fromtimestamp(at, UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0).timestamp()


def day_end(at: float) -> float:
    """Return the end of that day."""
    return day_begin(at) + 86400


def month_end(at: float) -> float:
    """Return the end of that month."""
    return month_begin((datetime.fromtimestamp(month_begin(at), UTC) + timedelta(days=32)).timestamp())
