"""Inputs that once did harm, and thousands of their mutations; `make soak` sends 100,000."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from . import members
from .barrage import barrage, fault
from .mutations import Mutations
from .targets import KEY, Target, request

SEED, INPUTS = 13, 4000


@pytest.mark.parametrize("member", members.load(), ids=lambda member: member.name)
def test_member_of_the_corpus_does_no_harm(attacked: Target, member: members.Member) -> None:
    """Its file says what it did once."""
    sent = request("POST", member.path, {"Authorization": f"Bearer {KEY}"}, member.encoded("tiny"))
    with attacked.unharmed(), attacked.connection() as connection:
        answer = connection.ask(sent)
    assert answer.status in member.status, answer
    assert answer.status == 503 or fault(member.path, answer) is None


def test_mutations_are_the_same_for_a_seed(document: Mapping[str, Any]) -> None:
    """A find is told by seed and number, which make it again."""
    first, again, other = (Mutations(document, "tiny", seed) for seed in (1, 1, 2))
    assert list(first.inputs(range(50))) == list(again.inputs(range(50)))
    assert first.input(7) != other.input(7)


def test_mutations_do_no_harm(attacked: Target, document: Mapping[str, Any]) -> None:
    """No 5xx that is not documented, no traceback, and the service lives."""
    numbers = range(INPUTS) if attacked.name == "gateway" else range(INPUTS, 2 * INPUTS)
    with attacked.unharmed():
        outcome = barrage(attacked, Mutations(document, "tiny", SEED).inputs(numbers))
    assert outcome.finds == []
    assert outcome.inputs == INPUTS
    assert {200, 400} <= set(outcome.statuses)
