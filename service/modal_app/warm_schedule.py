"""When a model is kept warm: until a moment, or on weekdays between two times of a time zone. Calls nothing."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from service.errors import UsageError

_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_LONGEST_S = 7 * 86400
_SPAN = re.compile(r"(\d{1,2}):(\d{2})-(\d{1,2}):(\d{2})")
_WEEKDAYS = 5
_DAY_MIN = 24 * 60


@dataclass(frozen=True)
class Schedule:
    """When one replica of a model is always up.

    Attributes:
        app: The tier's, or that of the model alone.
        until: Unix time; None: it is weekly.
        begin: Of each weekday, in minutes since midnight.
        end: Likewise; later than `begin`.
        tz: The time zone of the two.
        raised: The pool's least number of replicas was 0, and is 1 by this schedule.
    """

    app: str
    model: str
    dollars_per_hour: float
    until: float | None = None
    begin: int = 0
    end: int = 0
    tz: str = "UTC"
    raised: bool = False

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Schedule:
        """Return the schedule that `fields` describes."""
        return cls(**fields)

    def fields(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)

    def is_active(self, now: float) -> bool:
        """Tell whether a replica is to be up."""
        if self.until is not None:
            return now < self.until
        local = datetime.fromtimestamp(now, ZoneInfo(self.tz))
        return local.weekday() < _WEEKDAYS and self.begin <= local.hour * 60 + local.minute < self.end

    def is_over(self, now: float) -> bool:
        """Tell whether it is never active again."""
        return self.until is not None and now >= self.until

    def next_change(self, now: float) -> float:
        """Return when it next begins or ends; of one that is over, when it ended."""
        if self.until is not None:
            return self.until
        zone = ZoneInfo(self.tz)
        today = datetime.fromtimestamp(now, zone).replace(hour=0, minute=0, second=0, microsecond=0)
        days = [day for number in range(_WEEKDAYS + 3) if (day := today + timedelta(number)).weekday() < _WEEKDAYS]
        moments = [(day + timedelta(minutes=minute)).timestamp() for day in days for minute in (self.begin, self.end)]
        return min(moment for moment in moments if moment > now)

    def hours(self, now: float) -> float:
        """Return the hours that are left of it, or those of a weekday."""
        return (self.end - self.begin) / 60 if self.until is None else max(0.0, self.until - now) / 3600

    def text(self) -> str:
        """Return it for people: `weekdays 8:00-18:00 Europe/Berlin`."""
        if self.until is not None:
            return f"until {datetime.fromtimestamp(self.until, UTC):%Y-%m-%d %H:%M} UTC"
        return f"weekdays {_clock(self.begin)}-{_clock(self.end)} {self.tz}"


def parse_duration(text: str) -> int:
    """Return the seconds of `30m`, `2h` or `1h30m`.

    Raises:
        UsageError: It is no such duration, or longer than seven days.
    """
    match = _DURATION.fullmatch(text.strip().lower())
    parts = zip(match.groups(default="0"), (86400, 3600, 60, 1), strict=True) if match else ()
    seconds = sum(int(number) * unit for number, unit in parts)
    if not 0 < seconds <= _LONGEST_S:
        raise UsageError(f"--for {text} is no duration of up to seven days.", hint="Write 30m, 2h or 1h30m.")
    return seconds


def parse_weekdays(text: str, tz: str | None) -> tuple[int, int, str]:
    """Return begin and end of `8:00-18:00` in minutes since midnight, and the time zone.

    Raises:
        UsageError: It is no such span, or there is no such time zone.
    """
    if tz is None:
        raise UsageError("--weekdays needs a time zone.", hint="Add --tz, such as --tz Europe/Berlin.")
    try:
        ZoneInfo(tz)
    except (OSError, ValueError, KeyError) as error:  # what ZoneInfo raises of various names that are no zone's
        raise UsageError(f"There is no time zone '{tz}'.", hint="Name one such as Europe/Berlin or UTC.") from error
    match = _SPAN.fullmatch(text.strip())
    if match:
        numbers = [int(group) for group in match.groups()]
        begin, end = numbers[0] * 60 + numbers[1], numbers[2] * 60 + numbers[3]
        if max(numbers[1], numbers[3]) < 60 and begin < end <= _DAY_MIN:
            return begin, end, tz
    raise UsageError(
        f"--weekdays {text} is no span of a day.", hint="Write 8:00-18:00; the end is 24:00 at the latest."
    )


def _clock(minutes: int) -> str:
    return f"{minutes // 60}:{minutes % 60:02}"
