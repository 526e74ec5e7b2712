"""How long a boot takes, by the records of earlier ones."""

from __future__ import annotations

import pytest

from service.boots.groups import usual_seconds
from service.boots.records import BootRecord


def record(number: int, **fields: object) -> BootRecord:
    """Return the record of a boot."""
    facts = {"model": "m", "gpu": "NVIDIA L4", "outcome": "ready", "seconds": 10.0, "reason": None} | fields
    return BootRecord(
        id=f"{number:013d}",
        at=f"2026-01-01T00:00:{number:02d}+00:00",
        strategy="off",
        restored=False,
        fast_boot=True,
        versions={},
        phases=(),
        **facts,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([], None),
        ([record(1, seconds=30.0)], 30.0),
        ([record(1, outcome="failed"), record(2, model="other"), record(3, gpu="cpu")], None),
        ([record(number, seconds=float(number)) for number in range(10)], 7.0),
    ],
)
def test_usual_seconds_are_the_median_of_the_newest_boots_that_worked(
    records: list[BootRecord], expected: float | None
) -> None:
    """Of the same model on the same GPU, the newest five; None where there are none."""
    assert usual_seconds(reversed(records), "m", lambda gpu: gpu == "NVIDIA L4") == expected
