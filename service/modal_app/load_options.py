"""What a load test is asked for, here and by `modal run -m service.loadtest`: read once, and told in a phrase."""

from __future__ import annotations

import re

from service.benchmarks.locust_run import Users
from service.errors import UsageError
from service.modal_app.measured_service import MeasuredService

LONGEST_S = 3600
_TIME = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?")
_PAUSE = re.compile(r"(\d+(?:\.\d+)?)(?:-(\d+(?:\.\d+)?))?")


def users(
    service: MeasuredService,
    count: int,
    spawn_rate: float,
    run_time: str,
    pause: str,
    *,
    output_tokens: int,
    processes: int,
) -> Users:
    """Return the users of a load test.

    Raises:
        UsageError: A value is wrong.
    """
    if count < 1 or spawn_rate <= 0 or output_tokens < 1 or processes < 1:
        raise UsageError(
            f"--users {count}, --spawn-rate {spawn_rate:g}, --output-tokens {output_tokens} and "
            f"--processes {processes} have to be above zero.",
            hint="For example: --users 36 --spawn-rate 1.",
        )
    return Users(
        service.url,
        service.model,
        count,
        spawn_rate,
        _seconds(run_time),
        output_tokens,
        _pause(pause),
        processes=min(processes, count),
    )


def phrase(users: Users) -> str:
    """Return what the users did, in a phrase for a report."""
    shortest, longest = users.pause_s
    return (
        f"{users.users} users, {users.spawn_rate:g} more per second, for {users.run_time_s} s, "
        f"pauses of {shortest:g} to {longest:g} s"
    )


def _seconds(text: str) -> int:
    found = _TIME.fullmatch(text.strip().lower())
    hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0)
    total = hours * 3600 + minutes * 60 + seconds
    if not 0 < total <= LONGEST_S:
        raise UsageError(f"--run-time {text} is no time of up to an hour.", hint="Write 30s, 5m or 1h.")
    return total


def _pause(text: str) -> tuple[float, float]:
    found = _PAUSE.fullmatch(text.strip())
    shortest = float(found[1]) if found else -1.0
    longest = float(found[2] or found[1]) if found else -1.0
    if not 0 <= shortest <= longest:
        raise UsageError(f"--pause {text} is no span of seconds.", hint="Write 1-5, or 0.")
    return shortest, longest
