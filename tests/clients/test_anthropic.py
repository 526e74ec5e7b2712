"""Anthropic's own client through gateway and real engine: its key is `x-api-key`, its shapes are its own."""

from __future__ import annotations

import pytest

from tests.engine.running import Service

from . import clients
from .clients import COUNT, Outcomes


@pytest.fixture(scope="module")
def outcomes(served: Service) -> Outcomes:
    """The results of its cases."""
    return clients.outcomes(clients.python("anthropic_client.py"), served.url)


def test_anthropic_message_returns_the_known_answer(outcomes: Outcomes) -> None:
    """A whole message."""
    message = outcomes.value("message")
    assert (message["text"], message["ended"]) == (COUNT.content, "end_turn")


def test_anthropic_stream_adds_up_to_the_whole_answer(outcomes: Outcomes) -> None:
    """The client assembles the events into the same message, usage included."""
    assert outcomes.value("stream") == outcomes.value("message") | {"in_pieces": True}


def test_anthropic_count_tokens_counts_the_prompt(outcomes: Outcomes) -> None:
    """As many as the message's usage has."""
    assert outcomes.value("count_tokens") == outcomes.value("message")["in"]


def test_anthropic_models_lists_the_served_one(outcomes: Outcomes) -> None:
    """The list has Anthropic's shape beside OpenAI's, and so has each entry alone."""
    assert {"llm", "tiny"} <= set(outcomes.value("models"))


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


def test_anthropic_prompt_over_the_context_has_the_words_that_agents_look_for(outcomes: Outcomes) -> None:
    """Claude Code shortens the conversation on them; the error has Anthropic's type, shape and request id."""
    error = outcomes.value("too_long")
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith("prompt is too long: ")
    assert error["request_id"] == error["body"]["request_id"]
    assert set(error["body"]) == {"type", "error", "request_id"}
    assert set(error["body"]["error"]) == {"type", "message"}


def test_anthropic_model_that_cannot_start_is_requested_once(served: Service) -> None:
    """The client repeats a 503 twice, unless it is told that it is lasting."""
    assert clients.requests_until_it_gives_up(clients.python("anthropic_client.py"), served) == 1
