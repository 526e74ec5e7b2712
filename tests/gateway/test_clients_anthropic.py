"""Anthropic's own client through gateway and real engine: its key is `x-api-key`, its shapes are its own."""

from __future__ import annotations

import pytest

from tests.engine.running import Service

from . import clients
from .clients import CAPITAL, Outcomes


@pytest.fixture(scope="module")
def said(served: Service) -> Outcomes:
    """What became of its cases."""
    return clients.outcomes(clients.python("anthropic_client.py"), served.url)


def test_anthropic_message_gives_the_words(said: Outcomes) -> None:
    """A whole message."""
    message = said.value("message")
    assert (message["text"], message["ended"]) == (CAPITAL.content, "end_turn")


def test_anthropic_stream_gives_the_same_in_pieces(said: Outcomes) -> None:
    """The client puts events together to the very message, usage included."""
    assert said.value("stream") == said.value("message") | {"in_pieces": True}


def test_anthropic_count_tokens_counts_the_prompt(said: Outcomes) -> None:
    """As many as the message's usage has."""
    assert said.value("count_tokens") == said.value("message")["in"]


def test_anthropic_wrong_key_is_an_authentication_error(said: Outcomes) -> None:
    """The client raises its own class for it."""
    raised, status, message = said.raised("wrong_key")
    assert (raised, status) == ("AuthenticationError", 401)
    assert "sk-wrong" not in message


def test_anthropic_unknown_model_is_a_not_found_error_with_the_nearest(said: Outcomes) -> None:
    """The client raises its own class for it, and the sentence helps."""
    raised, status, message = said.raised("unknown_model")
    assert (raised, status) == ("NotFoundError", 404)
    assert "Did you mean 'tiny'?" in message
