"""What a day (UTC) has cost, as it is kept outside of the gateway's container."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import BaseModel, ValidationError


class Running(BaseModel):
    """Replicas of a pool as they were counted last; idle ones end at `until`, in seconds since 1970."""

    replicas: int
    dollars_per_hour: float
    until: float


class Day(BaseModel):
    """What a day (UTC) has cost, up to `at`.

    Attributes:
        woken: A pool was woken.
        stopped: The limit was reached.
        running: Pools with replicas, by name.
        lowered: Settings of the autoscalers of pools that were scaled to zero.
    """

    day: str
    at: float
    dollars: float = 0.0
    woken: bool = False
    stopped: bool = False
    running: dict[str, Running] = {}
    lowered: dict[str, dict[str, int]] = {}

    @classmethod
    def of_record(cls, record: dict[str, Any] | None) -> Day | None:
        """Return the day of a saved record; None: there is none, or it is of another version."""
        with suppress(ValidationError):
            return cls.model_validate(record) if record else None
        return None

    def is_stopped(self, now: float) -> bool:
        """Tell whether the limit was reached on the day of `now`."""
        return self.stopped and self.day == date_of(now)


def date_of(at: float) -> str:
    """Return the day of a moment, in seconds since 1970."""
    return datetime.fromtimestamp(at, UTC).date().isoformat()


def end_of(day: str) -> float:
    """Return when a day ends."""
    return (datetime.fromisoformat(day).replace(tzinfo=UTC) + timedelta(days=1)).timestamp()
