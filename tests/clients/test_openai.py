"""OpenAI's own clients, Python's and JavaScript's, through gateway and real engine: same cases, same answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.running import Service

from . import clients
from .clients import CALL, CHOICES, CONTINUATION, COUNT, JOHN, UNKNOWN, Outcomes


@pytest.fixture(scope="module", params=["python", "javascript"])
def outcomes(request: pytest.FixtureRequest, served: Service, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """The results of the cases of one of the two clients."""
    if request.param == "python":
        return clients.outcomes(clients.python("openai_client.py"), served.url)
    return clients.outcomes(clients.javascript(tmp_path_factory.mktemp("node"), "openai_client.mjs"), served.url)


def test_openai_chat_returns_the_known_answer(outcomes: Outcomes) -> None:
    """A whole answer, its end and the count of its tokens."""
    chat = outcomes.value("chat")
    assert (chat["text"], chat["ended"]) == (COUNT.content, "stop")
    assert chat["tokens"] > 0


def test_openai_stream_adds_up_to_the_whole_answer(outcomes: Outcomes) -> None:
    """The deltas add up to the whole answer, and the last chunk has its usage."""
    assert outcomes.value("stream") == outcomes.value("chat") | {"in_pieces": True}


def test_openai_completion_continues_the_prompt(outcomes: Outcomes) -> None:
    """Whole and streamed."""
    assert outcomes.value("completion") == outcomes.value("completion_stream") == CONTINUATION


def test_openai_json_schema_fits(outcomes: Outcomes) -> None:
    """`response_format` with a schema gives the object."""
    assert outcomes.value("schema") == JOHN


def test_openai_choice_is_one_of_the_choices(outcomes: Outcomes) -> None:
    """VLLM's own field reaches the engine as the clients send it."""
    assert outcomes.value("choice") in CHOICES


def test_openai_tools_are_called(outcomes: Outcomes) -> None:
    """The call has the tool's name and arguments that parse."""
    assert outcomes.value("tools") == CALL


def test_openai_models_lists_the_served_one(outcomes: Outcomes) -> None:
    """Its key is among the names."""
    assert "tiny" in outcomes.value("models")


def test_openai_wrong_key_is_an_authentication_error(outcomes: Outcomes) -> None:
    """The client raises its own class for it."""
    raised, status, message = outcomes.raised("wrong_key")
    assert (raised, status) == ("AuthenticationError", 401)
    assert "sk-wrong" not in message


def test_openai_unknown_model_is_a_not_found_error_with_the_nearest(outcomes: Outcomes) -> None:
    """The client raises its own class for it; the message names the nearest model."""
    raised, status, message = outcomes.raised("unknown_model")
    assert (raised, status) == ("NotFoundError", 404)
    assert f"'{UNKNOWN}'" in message
    assert "Did you mean 'tiny'?" in message


def test_openai_prompt_over_the_context_has_the_code_that_agents_look_for(outcomes: Outcomes) -> None:
    """In the fields of the client's own error."""
    expected = {"code": "context_length_exceeded", "type": "invalid_request_error", "param": "messages"}
    assert outcomes.value("too_long") == expected


def test_openai_files_and_batches_are_driven_unchanged(outcomes: Outcomes) -> None:
    """Upload, create, list, retrieve, content and delete; a bad line stands in the error file with its number."""
    assert outcomes.value("batch") == {
        "listed": True,
        "counts": [4, 3, 1],
        "ids": ["a", "b", "c"],
        "texts": [COUNT.content] * 3,
        "error": [4, "invalid_json"],
        "metadata": {"k": "v"},
        "deleted": True,
    }


def test_openai_model_that_cannot_start_is_requested_once(served: Service, tmp_path: Path) -> None:
    """Python's client and JavaScript's repeat a 503 twice, unless they are told that it is lasting."""
    for client in (clients.python("openai_client.py"), clients.javascript(tmp_path, "openai_client.mjs")):
        assert clients.requests_until_it_gives_up(client, served) == 1


def test_openai_every_way_to_name_a_model_answers(served: Service, tmp_path: Path) -> None:
    """The key with its GPU behind it, the default's alias, and the suffix for tool calls; each in any case."""
    for name in ("tiny-l4", "llm", "tiny-local", "Tiny-L4"):
        outcomes = clients.outcomes(clients.python("openai_client.py"), served.url, model=name, cases=["chat", "tools"])
        assert outcomes.value("chat")["text"] == COUNT.content
        assert outcomes.value("tools") == CALL
