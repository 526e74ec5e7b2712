"""LangChain's `ChatOpenAI` through gateway and real engine."""

from __future__ import annotations

import pytest

from tests.engine.running import Service

from . import clients
from .clients import CALL, COUNT, JOHN, Outcomes


@pytest.fixture(scope="module")
def outcomes(served: Service) -> Outcomes:
    """The results of its cases."""
    return clients.outcomes(clients.python("langchain_client.py"), served.url)


def test_langchain_invoke_returns_the_known_answer(outcomes: Outcomes) -> None:
    """A whole answer with its usage."""
    answer = outcomes.value("invoke")
    assert answer["text"] == COUNT.content
    assert answer["tokens"] > 0


def test_langchain_stream_returns_the_answer_in_pieces(outcomes: Outcomes) -> None:
    """The chunks add up."""
    assert outcomes.value("stream") == {"text": COUNT.content, "in_pieces": True}


def test_langchain_structured_output_is_the_object(outcomes: Outcomes) -> None:
    """`with_structured_output` sends the schema and parses what it forced."""
    assert outcomes.value("structured") == JOHN


def test_langchain_bound_tools_are_called(outcomes: Outcomes) -> None:
    """`bind_tools` gets a call with arguments."""
    assert outcomes.value("tools") == CALL


def test_langchain_wrong_key_is_openais_authentication_error(outcomes: Outcomes) -> None:
    """LangChain raises the error of OpenAI's client or a subclass of it."""
    raised, status, _ = outcomes.raised("wrong_key")
    assert "AuthenticationError" in raised
    assert status == 401
