"""Pydantic AI, Instructor, the AI SDK of Vercel and a loop of aiohttp through gateway and real engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.dialogues import dialogue
from tests.engine.running import Service

from . import clients
from .clients import CALL, COUNT, FRAMEWORKS, JOHN, Client, Outcomes, key_of

REQUESTS = {"aiohttp": 1, "pydantic-ai": 5, "instructor": 1, "ai-sdk": 5}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each has a working directory of its own."""
    return tmp_path_factory.mktemp("frameworks")


@pytest.fixture(scope="module")
def frameworks(served: Service, work: Path) -> dict[str, Outcomes]:
    """The results of the cases of each."""
    return {name: clients.outcomes(_start(name, work / name), served.url, key_of(name)) for name in FRAMEWORKS}


@pytest.fixture(params=["pydantic-ai", "ai-sdk"])
def agentic(request: pytest.FixtureRequest) -> str:
    """The name of one that runs the tools which the model calls."""
    return str(request.param)


def _start(name: str, directory: Path) -> Client:
    directory.mkdir()
    script = f"{name.replace('-', '_')}_client"
    if name == "ai-sdk":
        return clients.javascript(directory, f"{script}.mjs")
    return clients.python(f"{script}.py", directory)


def test_aiohttp_loop_over_lines_reads_the_stream(frameworks: dict[str, Outcomes]) -> None:
    """A program that knows `data: ` and `[DONE]` alone gets the answer in pieces."""
    assert frameworks["aiohttp"].value("stream") == {"text": COUNT.content, "in_pieces": True}


def test_instructor_constraints_of_pydantic_hold(frameworks: dict[str, Outcomes]) -> None:
    """The model has `pattern` beside `minLength`, and `multipleOf`; Instructor accepts the answer without a retry."""
    assert frameworks["instructor"].value("schema") == JOHN


def test_framework_answers_whole_and_in_pieces(frameworks: dict[str, Outcomes], agentic: str) -> None:
    """Both have the known text, and the whole one its usage."""
    whole = frameworks[agentic].value("chat")
    assert whole["text"] == COUNT.content
    assert whole["tokens"] > 0
    assert frameworks[agentic].value("stream") == {"text": COUNT.content, "in_pieces": True}


def test_framework_structured_output_is_the_object(frameworks: dict[str, Outcomes], agentic: str) -> None:
    """`NativeOutput` and `Output.object` send the schema as `response_format`."""
    assert frameworks[agentic].value("schema") == JOHN


def test_framework_runs_the_tool_and_tells_its_result(
    frameworks: dict[str, Outcomes], agentic: str, work: Path
) -> None:
    """The tool writes its argument into a file; a second request has the call and the result."""
    assert frameworks[agentic].value("tool_is_run") == dialogue("weather-answer").content
    assert (work / agentic / "city.txt").read_text() == CALL["arguments"]["city"]


def test_framework_wrong_key_raises_its_own_error_with_the_gateways_sentence(
    frameworks: dict[str, Outcomes], agentic: str
) -> None:
    """The class is the framework's."""
    raised, status, message = frameworks[agentic].raised("wrong_key")
    assert raised == {"pydantic-ai": "ModelHTTPError", "ai-sdk": "APICallError"}[agentic]
    assert status == 401
    assert "API key is needed" in message


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_framework_requests_are_logged_with_its_key_and_status_200(
    frameworks: dict[str, Outcomes], name: str, served: Service
) -> None:
    """None was retried, and none failed."""
    assert frameworks[name]
    lines = clients.logged(served, name, REQUESTS[name])
    assert len(lines) == REQUESTS[name], lines
    for line in lines:
        assert (line["method"], line["path"], line["model"]) == ("POST", "/v1/chat/completions", "tiny")
        assert (line["status"], line["code"]) == (200, None)
