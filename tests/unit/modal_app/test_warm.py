"""Schedules that keep models warm: when each is active, and what is done with its pool."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from types import SimpleNamespace
from typing import Any
from zoneinfo import ZoneInfo

import modal
import pytest

from service.errors import ServiceError, UsageError
from service.modal_app import account, spend_limits, warm
from service.modal_app.gateway_deployment import GatewayDeployment
from service.modal_app.warm_schedule import Schedule, parse_duration, parse_weekdays
from service.registry.models import Registry
from service.settings import Settings

BERLIN = ZoneInfo("Europe/Berlin")
WEEKLY = Schedule("vllm-l4", "tiny", 0.8, begin=8 * 60, end=18 * 60, tz="Europe/Berlin")


def at(text: str) -> float:
    """Return a moment in Berlin as Unix time."""
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN).timestamp()


ONCE = Schedule("vllm-l4", "tiny", 0.8, until=at("2026-11-30T10:00"))


@pytest.mark.parametrize(
    ("moment", "active", "change"),
    [
        ("2026-11-30T07:59", False, "2026-11-30T08:00"),  # a Monday
        ("2026-11-30T08:00", True, "2026-11-30T18:00"),
        ("2026-11-30T18:00", False, "2026-12-01T08:00"),
        ("2026-12-04T18:00", False, "2026-12-07T08:00"),  # over the weekend
        ("2026-12-05T12:00", False, "2026-12-07T08:00"),
        ("2026-03-27T19:00", False, "2026-03-30T08:00"),  # the clocks change in that weekend
    ],
)
def test_weekly_schedule_is_active_between_its_times_in_its_zone(moment: str, active: bool, change: str) -> None:
    """Monday to Friday, by the clock on the wall."""
    assert WEEKLY.is_active(at(moment)) is active
    assert WEEKLY.next_change(at(moment)) == at(change)
    assert not WEEKLY.is_over(at(moment))


def test_schedule_until_a_moment_is_over_then() -> None:
    """Until then it is active; the hours that are left are what it costs."""
    before, after = at("2026-11-30T09:30"), at("2026-11-30T10:00")
    assert (ONCE.is_active(before), ONCE.is_over(before), ONCE.hours(before)) == (True, False, 0.5)
    assert (ONCE.is_active(after), ONCE.is_over(after), ONCE.hours(after)) == (False, True, 0.0)
    assert (ONCE.text(), WEEKLY.text()) == ("until 2026-11-30 09:00 UTC", "weekdays 8:00-18:00 Europe/Berlin")
    assert (WEEKLY.hours(before), Schedule.from_fields(WEEKLY.fields())) == (10.0, WEEKLY)


@pytest.mark.parametrize(("text", "seconds"), [("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("7d", 604800), ("9S", 9)])
def test_duration_is_read(text: str, seconds: int) -> None:
    """Days, hours, minutes and seconds."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0m", "30", "8d", "m", "-5m", "1h 30m"])
def test_duration_that_is_none_is_refused(text: str) -> None:
    """It says how to write one."""
    with pytest.raises(UsageError, match="Write 30m, 2h or 1h30m"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "tz", "sentence"),
    [
        ("8:00-18:00", None, "needs a time zone"),
        ("8:00-18:00", "Europe/Berlyn", "There is no time zone 'Europe/Berlyn'"),
        ("8:00-18:00", "../etc/passwd", "There is no time zone"),
        ("8-18", "UTC", "is no span of a day"),
        ("18:00-8:00", "UTC", "is no span of a day"),
        ("8:00-8:00", "UTC", "is no span of a day"),
        ("8:00-24:01", "UTC", "is no span of a day"),
        ("8:60-9:00", "UTC", "is no span of a day"),
    ],
)
def test_weekdays_that_are_none_are_refused(text: str, tz: str | None, sentence: str) -> None:
    """Span and zone."""
    assert parse_weekdays("0:00-24:00", "UTC") == (0, 1440, "UTC")
    with pytest.raises(UsageError, match=sentence):
        parse_weekdays(text, tz)


class Account:
    """Schedules and pools of an account; `least` is None where the app is not deployed."""

    def __init__(self) -> None:
        self.entries: dict[str, Any] = {}
        self.least: int | None = 0
        self.log: list[int] = []
        self.refuses = False
        self.refused_models: set[str] = set()

    def set_autoscaler(self, _app: str, model: str, *, min_containers: int) -> None:
        """Set the least number of replicas."""
        if self.refuses or model in self.refused_models:
            raise ServiceError("Modal refused.")
        self.least = min_containers
        self.log.append(min_containers)

    def autoscaler(self, _app: str, _model: str) -> Any:
        """Return the settings."""
        if self.least is None:
            with account.translate_errors("look"):
                raise modal.exception.NotFoundError("No such app.")
        return SimpleNamespace(min_containers=self.least)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Account]:
    """An account without Modal."""
    found = Account()
    monkeypatch.setattr(account, "set_autoscaler", found.set_autoscaler)
    monkeypatch.setattr(account, "autoscaler", found.autoscaler)
    monkeypatch.setattr(warm.Schedules, "_dict", lambda _: found.entries)
    return found


class Clock:
    """A clock that moves when somebody sleeps."""

    def __init__(self, moment: float) -> None:
        self.moment, self.slept = moment, 0

    def now(self) -> float:
        """Return the time."""
        return self.moment

    def sleep(self, seconds: float) -> None:
        """Wait."""
        self.moment += seconds
        self.slept += 1


def keep(moment: float) -> Clock:
    """Run `keep` at a moment."""
    clock = Clock(moment)
    assert warm.keep(None, lambda _: None, sleep=clock.sleep, now=clock.now) == {}
    return clock


def test_keep_raises_a_pool_lowers_it_at_the_very_moment_and_forgets_what_is_over(pool: Account) -> None:
    """A run waits for a moment that comes before the next run."""
    warm.Schedules(None).put(ONCE)
    assert keep(at("2026-11-30T09:30")).slept == 0
    assert (pool.log, pool.entries["vllm-l4/tiny"]["raised"]) == ([1], True)
    clock = keep(at("2026-11-30T09:50"))
    assert (clock.moment, clock.slept) == (ONCE.until, 1)
    assert (pool.log, pool.entries) == ([1, 0], {})


def test_keep_of_a_weekly_schedule_raises_again_the_next_day(pool: Account) -> None:
    """And again within the day, where a deploy has ended what was set."""
    warm.Schedules(None).put(WEEKLY)
    for moment in ("2026-11-30T07:00", "2026-11-30T08:00", "2026-11-30T18:00", "2026-12-01T08:01"):
        keep(at(moment))
    assert pool.log == [1, 0, 1]
    pool.least = 0
    keep(at("2026-12-01T09:00"))
    assert pool.log == [1, 0, 1, 1]


def test_keep_raises_nothing_that_the_limits_forbid_and_tries_again(pool: Account) -> None:
    """The reason is returned; a pool that is up is not asked about, nor one that is to end."""
    warm.Schedules(None).put(WEEKLY)
    asked: list[Schedule] = []

    def why_not(schedule: Schedule) -> str:
        asked.append(schedule)
        return "Too many GPUs."

    def refused(moment: str) -> dict[str, str]:
        return warm.keep(None, why_not, once=True, now=lambda: at(moment))

    assert refused("2026-11-30T09:00") == {"vllm-l4/tiny": "Too many GPUs."}
    assert (pool.log, pool.entries["vllm-l4/tiny"]["raised"], asked) == ([], False, [WEEKLY])
    keep(at("2026-11-30T09:15"))
    assert pool.log == [1]
    assert refused("2026-11-30T09:30") == {}
    assert refused("2026-11-30T19:00") == {}
    assert (pool.log, len(asked)) == ([1, 0], 1)


def test_keep_once_waits_for_no_later_moment(pool: Account) -> None:
    """It is what the command asks for, which waits for its answer."""
    warm.Schedules(None).put(ONCE)
    clock = Clock(at("2026-11-30T09:50"))
    warm.keep(None, lambda _: None, once=True, sleep=clock.sleep, now=clock.now)
    assert (pool.log, clock.slept) == ([1], 0)


def test_keep_leaves_alone_what_the_user_has_scaled(pool: Account) -> None:
    """A pool that was up before stays up, and one that was scaled meanwhile stays as it is."""
    pool.least = 2
    warm.Schedules(None).put(WEEKLY)
    keep(at("2026-11-30T09:00"))
    keep(at("2026-11-30T19:00"))
    assert pool.log == []
    pool.least = 0
    keep(at("2026-12-01T09:00"))
    pool.least = 3
    keep(at("2026-12-01T19:00"))
    assert (pool.log, pool.least) == ([1], 3)


def test_keep_of_an_app_that_is_not_deployed_does_nothing(pool: Account) -> None:
    """A schedule that is over is forgotten nevertheless."""
    pool.least = None
    warm.Schedules(None).put(replace(ONCE, raised=True))
    keep(at("2026-11-30T09:00"))
    assert len(pool.entries) == 1
    keep(at("2026-11-30T10:00"))
    assert (pool.log, pool.entries) == ([], {})


def test_keep_that_modal_refuses_fails_and_the_next_run_makes_up_for_it(pool: Account) -> None:
    """What was to be raised is lowered later in any case."""
    warm.Schedules(None).put(ONCE)
    pool.refuses = True
    with pytest.raises(ServiceError, match="Modal refused"):
        keep(at("2026-11-30T09:00"))
    assert pool.entries["vllm-l4/tiny"]["raised"]
    pool.refuses = False
    keep(at("2026-11-30T09:15"))
    assert pool.log == [1]


def test_end_of_a_schedule_lowers_its_pool(pool: Account) -> None:
    """Only those of these apps, and of this model."""
    schedules = warm.Schedules(None)
    for schedule in (WEEKLY, replace(WEEKLY, app="vllm-h100"), replace(WEEKLY, model="qwen3-8b")):
        schedules.put(schedule)
        pool.least = 0
        warm.apply(schedules, schedule, at("2026-11-30T09:00"), lambda _: None)
    assert [one.model for one in warm.end(schedules, {"vllm-l4"}, "tiny")] == ["tiny"]
    assert (pool.log, len(pool.entries)) == ([1, 1, 1, 0], 2)
    warm.end(schedules, {"vllm-l4", "vllm-h100"})
    assert pool.entries == {}


@pytest.mark.parametrize("begun", [False, True])
def test_schedule_that_is_ended_while_it_is_applied_stays_ended(pool: Account, begun: bool) -> None:
    """Before its pool is raised, while the limits are asked, or between: it would be paid for until somebody looks."""
    schedules = warm.Schedules(None)
    schedules.put(WEEKLY)

    def end() -> None:
        warm.end(schedules, {"vllm-l4"})

    def why_not(_: Schedule) -> None:
        if not begun:
            end()

    raise_pool = pool.set_autoscaler

    def set_autoscaler(app: str, model: str, *, min_containers: int) -> None:
        if begun and min_containers:
            end()
        raise_pool(app, model, min_containers=min_containers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(account, "set_autoscaler", set_autoscaler)
        assert warm.apply(schedules, WEEKLY, at("2026-11-30T09:00"), why_not) is None
    assert (pool.entries, pool.least) == ({}, 0)


@pytest.mark.usefixtures("pool")
def test_limits_of_spending_know_which_pools_a_schedule_has_raised() -> None:
    """A pool of the tier's app and one of the model's own app have one name; an app of another service has none."""
    kept_warm = spend_limits._KeptWarm(GatewayDeployment(Settings(), Registry.load()))
    raised = replace(WEEKLY, raised=True)
    for schedule in (raised, replace(WEEKLY, app="vllm-tiny-l4"), replace(WEEKLY, app="vllm-h100")):
        warm.Schedules(None).put(schedule)
    warm.Schedules(None).put(replace(raised, app="other"))
    assert asyncio.run(kept_warm()) == {"tiny on L4": True, "tiny on H100": False}


class KeepWarm:
    """The function of the gateway's app: `answer` runs in it where `once` is asked for."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self.answer, self.spawned, self.cancelled = answer, 0, False

    def hydrate(self) -> None:
        """Find it."""

    def spawn(self, *, once: bool = False) -> KeepWarm:
        """Begin a call."""
        self.spawned += not once
        return self

    def get(self) -> Any:
        """Return what the call returns."""
        return self.answer()

    def cancel(self) -> None:
        """End the call."""
        self.cancelled = True


def begin(monkeypatch: pytest.MonkeyPatch, schedule: Schedule, answer: Callable[[], Any]) -> tuple[KeepWarm, Any]:
    """Set a schedule; return the function and what came of it."""
    function = KeepWarm(answer)
    monkeypatch.setattr(modal.Function, "from_name", lambda *_: function)
    try:
        return function, warm.begin(warm.Schedules(None), schedule, "vllm-gateway")
    except (ServiceError, KeyboardInterrupt) as error:
        return function, error


def kept_once() -> dict[str, Any]:
    """Do as the function of this version."""
    return warm.keep(None, lambda _: None, once=True, now=lambda: at("2026-11-30T09:00"))


def older() -> None:
    """Do as a gateway that does not know `once`."""
    raise TypeError("keep_warm() got an unexpected keyword argument 'once'")


def interrupted() -> None:
    """Raise the pool, and be interrupted."""
    kept_once()
    raise KeyboardInterrupt


def lost() -> None:
    """Raise the pool, and lose the connection."""
    kept_once()
    raise modal.exception.ConnectionError("The connection was lost.")


@pytest.mark.parametrize("before", [None, WEEKLY, replace(WEEKLY, raised=True)])
@pytest.mark.parametrize("answer", [older, interrupted, lost])
def test_begin_that_fails_leaves_what_was_there_before(
    answer: Callable[[], Any], before: Schedule | None, pool: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that was told to have failed costs money: neither a schedule, nor a pool that it has raised."""
    schedules = warm.Schedules(None)
    if before:
        schedules.put(before)
        pool.least = int(before.raised)
    least = pool.least
    function, error = begin(monkeypatch, ONCE, answer)
    assert isinstance(error, KeyboardInterrupt if answer is interrupted else ServiceError)
    assert schedules.all() == ([before] if before else [])
    assert (pool.least, function.spawned, function.cancelled) == (least, 0, answer is not older)


def test_begin_whose_schedule_cannot_be_taken_back_tells_how_to_end_it(
    pool: Account, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first error is the one that ends the command."""

    def gone() -> None:
        kept_once()
        pool.refuses = True
        raise modal.exception.ConnectionError("The connection was lost.")

    _, error = begin(monkeypatch, ONCE, gone)
    assert "The connection was lost" in str(error)
    assert "may stand. End it: vllm-service warm tiny --end. Modal refused." in caplog.text


def test_begin_fails_by_its_own_pool_alone(pool: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    """The schedule of another pool that Modal refuses is that pool's matter."""
    other = replace(WEEKLY, model="qwen3-8b")
    warm.Schedules(None).put(other)
    pool.refused_models.add(other.model)
    function, found = begin(monkeypatch, ONCE, kept_once)
    assert (found, pool.log, function.spawned) == (None, [1], 1)
    pool.least = 0
    pool.refused_models.add(ONCE.model)
    function, error = begin(monkeypatch, ONCE, kept_once)
    assert isinstance(error, ServiceError)
    assert (str(error), function.spawned) == ("Modal refused.", 0)
