"""What a prefetch prints on a terminal, into a file, and as JSON."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from service.cli.prefetch import ProgressDisplay, duration, follow, size
from service.errors import WeightsError
from service.registry.models import ModelSpec
from service.weights import revisions
from service.weights.prefetch import (
    Message,
    ModelFailed,
    ModelReady,
    PrefetchRequest,
    RevisionRemoved,
    RevisionResolved,
)
from service.weights.progress import Progress

A = "a" * 40
REQUEST = PrefetchRequest(specs=(ModelSpec(key="mine", hub_id="org/mine", revision=A, weights_gb=9.4),))


class Clock:
    """A clock that the test sets."""

    now = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


def progress(done_mb: float, phase: str = "fetching") -> Progress:
    """Return the progress of a repository of 1000 MB."""
    return Progress("org/mine", int(done_mb * 1e6), 1_000_000_000, 1, 3, phase)


def displayed(clock: Clock, *, terminal: bool) -> tuple[ProgressDisplay, io.StringIO]:
    """Return a display and what it prints."""
    out = io.StringIO()
    return ProgressDisplay(Console(file=out, force_terminal=terminal, width=120, highlight=False), clock), out


def test_progress_display_without_a_terminal_prints_a_line_now_and_then() -> None:
    """Amount, rate and time left, every five seconds; the rate counts from the bytes at the start."""
    clock = Clock()
    display, out = displayed(clock, terminal=False)
    display.show(progress(400))
    for second in range(1, 12):
        clock.now = second
        display.show(progress(400 + 50 * second))

    assert out.getvalue().splitlines() == [
        "fetching org/mine: 650 MB of 1.0 GB, 50.0 MB/s, 7 s left",
        "fetching org/mine: 900 MB of 1.0 GB, 50.0 MB/s, 2 s left",
    ]


def test_progress_display_without_progress_shows_no_time_left() -> None:
    """The rate is zero."""
    clock = Clock()
    display, out = displayed(clock, terminal=False)
    display.show(progress(400))
    clock.now = 6
    display.show(progress(400))

    assert out.getvalue() == "fetching org/mine: 400 MB of 1.0 GB, 0 bytes/s\n"


def test_progress_display_at_a_terminal_draws_one_bar() -> None:
    """Bytes and files of the current repository; it is removed for a message."""
    with displayed(Clock(), terminal=True)[0] as display:
        display.show(progress(400))
        display.show(progress(500))
        assert display._bar is not None
        (task,) = display._bar.tasks
        assert (task.completed, task.total, task.fields["files"]) == (5e8, 1e9, "1/3 files")
        assert task.description == "fetching org/mine"
        display.show(progress(0, "verifying"))
        (task,) = display._bar.tasks
        assert task.description == "verifying org/mine"
        display.clear()
        assert display._bar.tasks == []


def test_follow_prints_results_and_records_commits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Results on stdout, everything else on stderr; a commit goes into the lock file."""
    lock = tmp_path / "models.lock.toml"
    request = REQUEST.model_copy(update={"recorded_in": str(lock)})
    follow(
        request,
        [
            RevisionResolved("org/mine", A),
            Message("Fetching org/mine"),
            progress(1000),
            ModelReady("mine", "org/mine", A, 9_400_000_000, fetched=True),
            ModelReady("other", "org/other", A, 830_000),
            ModelReady("tiny", None, None),
            RevisionRemoved("org/old", A, 2_000_000),
        ],
        as_json=False,
    )
    out, err = capsys.readouterr()

    assert revisions.read(lock) == {"org/mine": A}
    assert err.splitlines() == [f"org/mine is at {A}, recorded in {lock}", "Fetching org/mine"]
    assert out.splitlines() == [
        f"mine: org/mine at {A} is complete, 9.4 GB",
        f"other: org/other at {A} is complete, 830 kB, already in the cache",
        "tiny: a directory, nothing to fetch",
        f"removed org/old at {A}: 2.0 MB freed",
    ]


def test_follow_of_several_models_begins_with_their_size(capsys: pytest.CaptureFixture[str]) -> None:
    """A user of --all sees how much that is."""
    unknown = ModelSpec(key="other", hub_id="org/other")
    follow(PrefetchRequest(specs=(*REQUEST.specs, unknown)), [], as_json=False)

    assert capsys.readouterr().err == "2 models, 9.4 GB and 1 of unknown size when nothing is in the cache yet\n"


def test_follow_of_damage_names_the_files_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    """The hint has the command that fetches them again."""
    damaged = ModelReady("mine", "org/mine", A, damage=("a.safetensors is damaged", "b.safetensors is missing"))
    with pytest.raises(WeightsError, match=r"2 of the files of mine.*vllm-service prefetch org/mine$"):
        follow(REQUEST, [damaged, ModelReady("other", "org/other", A)], as_json=False)

    assert capsys.readouterr().out.splitlines() == [
        f"mine: org/mine at {A} is damaged",
        "  a.safetensors is damaged",
        "  b.safetensors is missing",
        f"other: org/other at {A} matches its checksums",
    ]


def test_follow_of_several_of_which_one_failed_fails(capsys: pytest.CaptureFixture[str]) -> None:
    """The reason is printed when it happens, the count at the end."""
    with pytest.raises(WeightsError, match=r"^1 of 2 models could not be fetched: mine\."):
        follow(REQUEST, [ModelFailed("mine", "it is gated."), ModelReady("other", "org/other", A, 5)], as_json=False)
    out, err = capsys.readouterr()

    assert err == "mine: it is gated.\n"
    assert out.startswith("other: ")


def test_follow_as_json_prints_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    """And nothing else on stdout, even if files are damaged."""
    with pytest.raises(WeightsError):
        follow(
            REQUEST, [ModelReady("mine", "org/mine", A, damage=("x",)), RevisionRemoved("org/old", A, 5)], as_json=True
        )
    found = json.loads(capsys.readouterr().out)

    assert found["models"] == [
        {"key": "mine", "hub_id": "org/mine", "revision": A, "size": 0, "fetched": False, "damage": ["x"]}
    ]
    assert found["failed"] == []
    assert found["freed"] == [{"hub_id": "org/old", "revision": A, "size": 5}]


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1500, "1.5 kB"),
        (123_456_789, "123 MB"),
        (9.4e9, "9.4 GB"),
        (6e11, "600 GB"),
    ],
)
def test_size_has_two_or_three_digits(count: float, said: str) -> None:
    """In powers of ten, as disks are sold."""
    assert size(count) == said


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (11_100, "3 h 05 min")]
)
def test_duration_has_a_fitting_unit(seconds: float, said: str) -> None:
    """5000 seconds are shown as minutes."""
    assert duration(seconds) == said
