"""Windows, periods and times of limits."""

from __future__ import annotations

import pytest

from service.errors import UsageError
from service.usage.limits import (
    PeriodTotal,
    Window,
    day_begin,
    day_end,
    month_begin,
    month_end,
    parse_span,
    parse_time,
    utc_text,
)


def test_window_never_lets_more_than_its_limit_into_any_minute() -> None:
    """Whatever the pattern of uses, and with a bounded number of entries."""
    times, limit = [0.0], 50
    window, taken = Window(lambda: times[-1]), []
    for step in range(20_000):
        times.append(times[-1] + (0.003 if step % 997 else 17.0))
        if window.used() < limit:
            window.add(1)
            taken.append(times[-1])
    for index in range(len(taken) - limit):
        assert taken[index + limit] - taken[index] >= 60
    assert len(taken) > limit * 3
    assert len(window._entries) <= 121


def test_window_tells_when_enough_of_it_has_passed() -> None:
    """And when all of it has."""
    times = [0.0]
    window = Window(lambda: times[-1])
    for at, amount in ((0.0, 10), (10.0, 20), (30.0, 5)):
        times.append(at)
        window.add(amount)

    assert [window.wait_s(excess) for excess in (1, 10, 11, 31)] == [30, 30, 40, 60]
    assert window.state() == (35, 60)
    times.append(95.0)
    assert window.state() == (0, 0)


@pytest.mark.parametrize(
    ("at", "day", "month"),
    [
        ("2026-11-30T23:59:59Z", ("2026-11-30", "2026-12-01"), ("2026-11-01", "2026-12-01")),
        ("2026-12-01T00:00:00Z", ("2026-12-01", "2026-12-02"), ("2026-12-01", "2027-01-01")),
        ("2028-02-29T12:00:00Z", ("2028-02-29", "2028-03-01"), ("2028-02-01", "2028-03-01")),
    ],
)
def test_periods_are_days_and_months_of_utc(at: str, day: tuple[str, str], month: tuple[str, str]) -> None:
    """Their ends are the beginnings of the next."""
    moment = parse_time(at)
    assert [utc_text(one)[:10] for one in (day_begin(moment), day_end(moment))] == [*day]
    assert [utc_text(one)[:10] for one in (month_begin(moment), month_end(moment))] == [*month]


def test_period_begins_with_nothing() -> None:
    """What was used in the one before is forgotten."""
    times = [parse_time("2026-11-30T23:59:59Z")]
    total = PeriodTotal(day_begin, day_end, lambda: times[-1])
    total.add(5)
    assert total.used() == 5
    times.append(times[-1] + 1)
    assert total.used() == 0


def test_spans_and_times_that_are_none_are_refused() -> None:
    """The error shows how to write one."""
    assert [parse_span(text) for text in ("0", "90s", "30m", "24h", "7d")] == [0, 90, 1800, 86_400, 604_800]
    for text in ("", "1", "1w", "-1h", "1.5h"):
        with pytest.raises(UsageError, match="24h"):
            parse_span(text)
    for text in ("", "tomorrow", "2026-13-01"):
        with pytest.raises(UsageError, match="2027-01-31"):
            parse_time(text)
