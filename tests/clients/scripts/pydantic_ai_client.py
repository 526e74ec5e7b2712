"""Pydantic AI's `Agent` on `OpenAIChatModel`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cases import ASKED, case, run
from pydantic_ai import Agent, NativeOutput, StructuredDict
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

QUESTION = ASKED["messages"][-1]["content"]


def model(key: str) -> OpenAIChatModel:
    """Return the model of the gateway."""
    return OpenAIChatModel(ASKED["model"], provider=OpenAIProvider(base_url=f"{ASKED['url']}/v1", api_key=key))


agent = Agent(model(ASKED["key"]))


@case
def chat() -> Any:
    """A whole answer, and the count of its tokens."""
    result = agent.run_sync(QUESTION)
    return {"text": result.output.strip(), "tokens": result.usage.output_tokens}


@case
def stream() -> Any:
    """An answer in pieces."""
    pieces = list(agent.run_stream_sync(QUESTION).stream_text(delta=True, debounce_by=None))
    return {"text": "".join(pieces).strip(), "in_pieces": len(pieces) > 1}


@case
def schema() -> Any:
    """An answer that fits a JSON schema, parsed."""
    person = NativeOutput(StructuredDict(ASKED["schema"], name="person"))
    return agent.run_sync(ASKED["messages_for_schema"][-1]["content"], output_type=person).output


@case
def tool_is_run() -> Any:
    """The agent runs the function that the model calls, and gives the model its result."""
    equipped = Agent(model(ASKED["key"]))

    @equipped.tool_plain(description="Get the current weather in a city.")
    def get_weather(city: str) -> dict[str, Any]:
        Path("city.txt").write_text(city)
        return {"temperature_c": 18, "sky": "clear"}

    return equipped.run_sync(ASKED["messages_for_tools"][-1]["content"]).output.strip()


@case
def wrong_key() -> Any:
    """A chat with a key that does not exist."""
    return Agent(model("sk-wrong")).run_sync(QUESTION).output


run()
