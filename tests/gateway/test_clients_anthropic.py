"""Anthropic's own client through gateway and real engine: its key is `x-api-key`, its shapes are its own."""

from __future__ import annotations

import pytest

from tests.engine.running import Service

from . import clients
from .clients import CAPITAL, Outcomes


@pytest.fixture(scope="module")
def outcomes(served: Service) -> Outcomes:
    """The results of its cases."""
    return clients.outcomes(clients.python("anthropic_client.py"), served.url)


def test_anthropic_message_returns_the_known_answer(outcomes: Outcomes) -> None:
    """A whole message."""
    message = outcomes.value("message")
    assert (message["text"], message["ended"]) == (CAPITAL.content, "end_turn")


def test_anthropic_stream_adds_up_to_the_whole_answer(outcomes: Outcomes) -> None:
    """The client assembles the events into the same message, usage included."""
    assert outcomes.value("stream") == outcomes.value("message") | {"in_pieces": True}


def test_anthropic_count_tokens_counts_the_prompt(outcomes: Outcomes) -> None:
    """As many as the message's usage has."""
    assert outcomes.value("count_tokens") == outcomes.value("message")["in"]


def test_anthropic_wrong_key_is_an_authentication_error(outcomes: Outcomes) -> None:
    """The client raises its own class for it."""
    raised, status, message = outcomes.raised("wrong_key")
    assert (raised, status) == ("AuthenticationError", 401)
    assert "sk-wrong" not in message


def test_anthropic_unknown_model_is_a_not_found_error_with_the_nearest(outcomes: Outcomes) -> None:
    """The client raises its own class for it; the message names the nearest model."""
    raised, status, message = outcomes.raised("unknown_model")
    assert (raised, status) == ("NotFoundError", 404)
    assert "Did you mean 'tiny'?" in message
