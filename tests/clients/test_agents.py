"""Agents of npm through gateway and real engine, connected by the command alone: each writes a file with its tool.

The model has memorised the tool calls and the last sentence (`memorised.py`). What the agents send and do is their own.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.running import Service

from . import memorised
from .clients import key_of, logged, sink
from .programs import AGENTS, CLAUDE_CODE, OPENCODE, Agent, Outcome


@pytest.fixture(scope="module", params=AGENTS, ids=lambda agent: agent.name)
def agent(request: pytest.FixtureRequest) -> Agent:
    """Each agent."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def elsewhere(agent: Agent) -> Iterator[socket.socket]:
    """Where the requests of one agent to other machines are sent."""
    with sink() as server:
        yield server


@pytest.fixture(scope="module")
def outcome(
    agent: Agent, agents_service: Service, elsewhere: socket.socket, tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    """What became of the page's commands."""
    proxy = f"http://127.0.0.1:{elsewhere.getsockname()[1]}"
    home = tmp_path_factory.mktemp(agent.name)
    agent.connect(home, agents_service.url)
    return agent.run(home, agents_service.url, proxy=proxy)


def test_agent_writes_the_file_with_its_tool_and_answers(agent: Agent, outcome: Outcome) -> None:
    """It exits with 0, the effect of the tool call is on disk, and the last sentence is what it prints."""
    assert outcome.code == 0, outcome.out + outcome.err
    assert outcome.written == memorised.CONTENT[agent.tool]
    assert memorised.ANSWER in outcome.out


def test_agent_requests_are_logged_with_its_key_and_status_200(
    agent: Agent, outcome: Outcome, agents_service: Service
) -> None:
    """One request is the prompt, another has the tool's result; none failed, and all are streams of the one route."""
    count = 3 if agent is OPENCODE else 2  # its third is the title of the conversation
    looked_up, *lines = logged(agents_service, agent.name, count + 1)  # the first is of `connect`
    assert (looked_up["method"], looked_up["path"], len(lines)) == ("GET", "/v1/models/llm", count), lines
    for line in lines:
        assert (line["method"], line["path"], line["model"]) == ("POST", agent.path, "agents")
        assert (line["status"], line["code"], line["stream"]) == (200, None, True)
    assert max(line["prompt_tokens"] for line in lines) > 10_000


def test_agent_sends_nothing_to_other_machines(agent: Agent, outcome: Outcome, elsewhere: socket.socket) -> None:
    """Its telemetry and its search for updates are off, as the page has it; opencode asks npm for a package."""
    contacted = 0
    while True:
        try:
            elsewhere.accept()[0].close()
        except BlockingIOError:
            break
        contacted += 1
    assert contacted <= (1 if agent is OPENCODE else 0)


def test_agent_with_a_wrong_key_says_so(agent: Agent, agents_service: Service, tmp_path: Path) -> None:
    """It ends with an error that has the gateway's sentence, and writes nothing."""
    agent.connect(tmp_path, agents_service.url)
    outcome = agent.run(tmp_path, agents_service.url, key="sk-wrong")
    assert outcome.code != 0, outcome.out
    assert "API key is needed" in outcome.out + outcome.err
    assert not list(outcome.work.iterdir())


def test_claude_code_without_a_model_name_is_answered_by_an_alias(agents_service: Service, tmp_path: Path) -> None:
    """It asks for Anthropic's newest model, which the operator's file gives to the default model."""
    given = {"ANTHROPIC_BASE_URL": agents_service.url, "ANTHROPIC_AUTH_TOKEN": key_of(CLAUDE_CODE.name)}
    limits = {"CLAUDE_CODE_MAX_CONTEXT_TOKENS": "40960", "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "8192"}
    outcome = CLAUDE_CODE.run(tmp_path, agents_service.url, **given, **limits)
    assert outcome.code == 0, outcome.out + outcome.err
    assert outcome.written == memorised.CONTENT[CLAUDE_CODE.tool]
