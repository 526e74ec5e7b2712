"""LangChain's `ChatOpenAI` through gateway and real engine."""

from __future__ import annotations

import pytest

from tests.engine.running import Service

from . import clients
from .clients import CALL, CAPITAL, JOHN, Outcomes


@pytest.fixture(scope="module")
def said(served: Service) -> Outcomes:
    """What became of its cases."""
    return clients.outcomes(clients.python("langchain_client.py"), served.url)


def test_langchain_invoke_gives_the_words(said: Outcomes) -> None:
    """A whole answer with its usage."""
    answer = said.value("invoke")
    assert answer["text"] == CAPITAL.content
    assert answer["tokens"] > 0


def test_langchain_stream_gives_the_words_in_pieces(said: Outcomes) -> None:
    """The chunks add up."""
    assert said.value("stream") == {"text": CAPITAL.content, "in_pieces": True}


def test_langchain_structured_output_is_the_object(said: Outcomes) -> None:
    """`with_structured_output` sends the schema and parses what it forced."""
    assert said.value("structured") == JOHN


def test_langchain_bound_tools_are_called(said: Outcomes) -> None:
    """`bind_tools` gets a call with arguments."""
    assert said.value("tools") == CALL


def test_langchain_wrong_key_is_openais_authentication_error(said: Outcomes) -> None:
    """LangChain hands on, or subclasses, what OpenAI's client raises."""
    raised, status, _ = said.raised("wrong_key")
    assert "AuthenticationError" in raised
    assert status == 401
