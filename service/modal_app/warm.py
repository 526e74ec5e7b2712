"""Keeps models warm by schedule: one replica is always up while one is active.

The schedules are entries of a `modal.Dict`, one a pool. `keep` runs in the gateway's app, every `PERIOD_S` by Modal's
cron, and brings the least number of replicas of each pool to what its schedule says now; it waits for the moments
that come before the next run. So a schedule survives restarts and deploys, and a run that failed is made up for by the
next one. A replica that ends a schedule ends after the tier's idle timeout. The limits of spending hold for warm models
too; `begin` has the gateway's app apply a schedule, since that app knows its limits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import modal

from service import interrupts
from service.errors import ServiceError
from service.modal_app import account
from service.modal_app.warm_schedule import Schedule

FUNCTION = "keep_warm"
CRON, PERIOD_S = "*/15 * * * *", 900
CPU, MEMORY_MB = 0.125, 256  # the least that Modal bills, and enough for its client
_SCHEDULES = "vllm-warm"
WhyNot = Callable[[Schedule], str | None]
_log = logging.getLogger(__name__)


class Schedules:
    """The schedules of an environment, by app and model.

    Args:
        prefix: What the names of this service's volumes and dictionaries begin with.
    """

    def __init__(self, prefix: str | None) -> None:
        self._name = f"{prefix or ''}{_SCHEDULES}"

    def all(self) -> list[Schedule]:
        """Return them, by app and model.

        Raises:
            ServiceError: Modal refused.
        """
        with account.translate_errors("read the schedules"):
            return sorted((Schedule.from_fields(fields) for fields in self._dict().values()), key=_key)

    def like(self, schedule: Schedule) -> Schedule | None:
        """Return the one of the same pool.

        Raises:
            ServiceError: Modal refused.
        """
        return next((one for one in self.all() if _key(one) == _key(schedule)), None)

    def put(self, schedule: Schedule) -> None:
        """Set the schedule of its pool.

        Raises:
            ServiceError: Modal refused.
        """
        with account.translate_errors("keep the schedule"):
            self._dict()[_key(schedule)] = schedule.fields()

    def note_raised(self, schedule: Schedule, *, raised: bool) -> bool:
        """Note whether the pool of a schedule is raised; tell whether it still has one: what was ended stays so.

        Raises:
            ServiceError: Modal refused.
        """
        if is_there := bool(self.like(schedule)):
            self.put(replace(schedule, raised=raised))
        return is_there

    def remove(self, schedule: Schedule) -> None:
        """Forget it.

        Raises:
            ServiceError: Modal refused.
        """
        with account.translate_errors("remove the schedule"):
            self._dict().pop(_key(schedule), None)

    def _dict(self) -> modal.Dict:
        return modal.Dict.from_name(self._name, create_if_missing=True)


def _key(schedule: Schedule) -> str:
    return f"{schedule.app}/{schedule.model}"


def begin(schedules: Schedules, schedule: Schedule, gateway: str) -> str | None:
    """Set the schedule of a pool, in place of the one before it, and have the gateway's app keep it from now on.

    Args:
        schedules: Where it is kept.
        schedule: What to keep.
        gateway: The gateway's app.

    Returns:
        Why the pool is not kept up now, although the schedule says so; None: it is, or need not be yet.

    Raises:
        ServiceError: The gateway's app is not deployed or of another version, or Modal refused. As after Ctrl-C,
            what was there before is there again.
    """
    with account.translate_errors(f"start '{FUNCTION}' of app '{gateway}'"):
        function = modal.Function.from_name(gateway, FUNCTION)
        try:
            function.hydrate()
        except modal.exception.NotFoundError as error:
            raise _older(gateway) from error
    replaced = schedules.like(schedule)
    try:
        schedules.put(replace(schedule, raised=bool(replaced and replaced.raised)))
        refused = _apply_now(function, schedule, gateway)
        with account.translate_errors(f"start '{FUNCTION}' of app '{gateway}'"):
            function.spawn()
    except BaseException:
        with interrupts.held_back():
            _take_back(schedules, schedule, replaced)
        raise
    return refused


def _apply_now(function: modal.Function[..., Any, Any], schedule: Schedule, gateway: str) -> str | None:
    """Have the gateway's app apply all schedules; return why this one's pool is not kept up. Ctrl-C ends that too."""
    with account.translate_errors(f"start '{FUNCTION}' of app '{gateway}'"):
        call = function.spawn(once=True)
        try:
            refused: str | dict[str, str] | None = call.get().get(_key(schedule))
        except TypeError as error:
            raise _older(gateway) from error
        except (KeyboardInterrupt, modal.exception.Error, OSError):
            with suppress(modal.exception.Error, OSError):
                call.cancel()
            raise
    if isinstance(refused, dict):
        raise ServiceError.from_fields(refused)
    return refused


def _take_back(schedules: Schedules, schedule: Schedule, replaced: Schedule | None) -> None:
    """Have what was there before a schedule be there again: the word fails, so nothing of it may cost money."""
    try:
        current = schedules.like(schedule)
        if current and not (replaced and replaced.raised):
            _lower(current)
        if replaced:
            schedules.put(replaced)
        else:
            schedules.remove(schedule)
    except ServiceError as error:
        way = f"vllm-service warm {schedule.model} --end"
        _log.error(
            "The schedule of '%s' in app '%s' may stand. End it: %s. %s", schedule.model, schedule.app, way, error
        )


def _older(gateway: str) -> ServiceError:
    return ServiceError(
        f"App '{gateway}' has no '{FUNCTION}' of this version: an older one deployed it, or nothing did.",
        hint="Deploy it again: vllm-service deploy.",
    )


def end(schedules: Schedules, apps: set[str], model: str | None = None) -> list[Schedule]:
    """End the schedules of these apps, or of one model of them, and return them.

    Raises:
        ServiceError: Modal refused.
    """
    ended = [one for one in schedules.all() if one.app in apps and model in {None, one.model}]
    for schedule in ended:
        _lower(schedule)
        schedules.remove(schedule)
    return ended


def keep(
    prefix: str | None,
    why_not: WhyNot,
    *,
    once: bool = False,
    sleep: Callable[[float], Any] = time.sleep,
    now: Callable[[], float] = time.time,
) -> dict[str, str | dict[str, str]]:
    """Apply all schedules now, and at each moment before the next run at which one begins or ends.

    Args:
        prefix: What the names of this service's volumes and dictionaries begin with.
        why_not: Returns why a pool must not be kept up: the limits of spending hold for warm models too.
        once: Apply them now alone.
        sleep: Waits for some seconds.
        now: Returns Unix time.

    Returns:
        Why pools are not kept as their schedules say, by app and model: the reason of a limit; with `once`, a failure
        too, as an error's fields.

    Raises:
        ServiceError: Modal refused, and it is not `once`; the schedules of other pools were applied.
    """
    schedules, until = Schedules(prefix), now() + PERIOD_S
    while True:
        moment, found = now(), schedules.all()
        refused: dict[str, str | dict[str, str]] = {}
        failures: list[ServiceError] = []
        for one in found:
            try:
                reason = apply(schedules, one, moment, why_not)
            except ServiceError as error:
                _log.error("Model '%s' of app '%s' is not kept as its schedule says. %s", one.model, one.app, error)
                failures.append(error)
                refused[_key(one)] = error.to_fields()
                continue
            refused |= {_key(one): reason} if reason else {}
            state = (
                f"not kept warm now: {reason}" if reason else "warm" if one.is_active(moment) else "not kept warm now"
            )
            _log.info("Model '%s' of app '%s', %s, is %s", one.model, one.app, one.text(), state)
        if failures and not once:
            raise failures[0]
        upcoming = [change for one in found if (change := one.next_change(moment)) > moment]
        if once or not upcoming or min(upcoming) > until:
            return refused
        sleep(max(0.0, min(upcoming) - now()))


def apply(schedules: Schedules, schedule: Schedule, now: float, why_not: WhyNot) -> str | None:
    """Bring a pool to what its schedule says of a moment; one that is over is removed.

    Only a pool without any replica that is always up is raised, if nothing speaks against it, and only one that was
    raised, and has not been scaled since, is lowered: what `scale` and `SERVICE_MIN_CONTAINERS` set stays. A schedule
    that `end` has removed meanwhile does not come back, and its pool is not left raised.

    Returns:
        Why it was not raised; None: it was, or need not be.

    Raises:
        ServiceError: Modal refused.
    """
    if schedule.is_active(now):
        if _least(schedule) != 0:
            return None
        if reason := why_not(schedule):
            return reason
        # noted first: what is raised is lowered, whatever happens here
        if not schedules.note_raised(schedule, raised=True):
            return None
        account.set_autoscaler(schedule.app, schedule.model, min_containers=1)
        if not schedules.like(schedule):
            account.set_autoscaler(schedule.app, schedule.model, min_containers=0)
        return None
    _lower(schedule)
    if schedule.is_over(now):
        schedules.remove(schedule)
    elif schedule.raised:
        schedules.note_raised(schedule, raised=False)
    return None


def _lower(schedule: Schedule) -> None:
    if schedule.raised and _least(schedule) == 1:
        account.set_autoscaler(schedule.app, schedule.model, min_containers=0)


def _least(schedule: Schedule) -> int | None:
    """Return the least number of replicas of a pool; None: its app is not deployed."""
    try:
        return int(account.autoscaler(schedule.app, schedule.model).min_containers or 0)
    except ServiceError as error:
        if isinstance(error.__cause__, modal.exception.NotFoundError):
            return None
        raise
