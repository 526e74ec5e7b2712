"""Errors: what happened apart from what to do, and their way across the border of a process."""

from __future__ import annotations

import json

import pytest

from service.errors import DiskSpaceError, ServiceError, UsageError, edit_distance


@pytest.mark.parametrize(("hint", "expected"), [("", "It broke."), ("Mend it.", "It broke. Mend it.")])
def test_error_as_text_joins_message_and_hint(hint: str, expected: str) -> None:
    """HTTP and logs have one sentence after the other."""
    assert str(ServiceError("It broke.", hint=hint)) == expected


@pytest.mark.parametrize(("hint", "expected"), [("", "error: Full."), ("Free some.", "error: Full.\nhint: Free some.")])
def test_error_on_a_terminal_has_a_line_for_message_and_hint(hint: str, expected: str) -> None:
    """The hint's line is there only where there is a hint."""
    assert DiskSpaceError("Full.", hint=hint).to_terminal() == expected


def test_error_that_crossed_a_process_is_the_same() -> None:
    """Its class decides the exit code."""
    fields = json.loads(json.dumps(DiskSpaceError("Full.", hint="Free some.").to_fields()))
    error = ServiceError.from_fields(fields)

    assert type(error) is DiskSpaceError
    assert (error.message, error.hint) == ("Full.", "Free some.")


@pytest.mark.parametrize("name", ["SystemExit", "did_you_mean", "OfANewerVersionError"])
def test_error_of_an_unknown_class_is_a_plain_one(name: str) -> None:
    """What comes from another process names no class of this one but errors."""
    error = ServiceError.from_fields({"error": name, "message": "It broke.", "hint": ""})

    assert type(error) is ServiceError
    assert not isinstance(error, UsageError)


@pytest.mark.parametrize(
    ("left", "right", "edits"),
    [
        ("port", "port", 0),
        ("", "port", 4),
        ("prot", "port", 1),
        ("opr", "port", 2),
        ("ports", "port", 1),
        ("fort", "port", 1),
        ("host", "port", 2),
        ("name", "model", 4),
    ],
)
def test_edit_distance_counts_a_swap_of_neighbours_as_one(left: str, right: str, edits: int) -> None:
    """It is the same in both directions."""
    assert edit_distance(left, right) == edit_distance(right, left) == edits
