"""LangChain's `ChatOpenAI`."""

from __future__ import annotations

from typing import Any

import langchain_openai
from cases import ASKED, case, run

model = langchain_openai.ChatOpenAI(
    model=ASKED["model"], base_url=f"{ASKED['url']}/v1", api_key=ASKED["key"], max_retries=0, timeout=120
)
QUESTION = ASKED["messages"][-1]["content"]


@case
def invoke() -> Any:
    """A whole answer, and the count of its tokens."""
    answer = model.invoke(QUESTION)
    return {"text": answer.content.strip(), "tokens": answer.usage_metadata["output_tokens"]}


@case
def stream() -> Any:
    """An answer in pieces."""
    pieces = [chunk.content for chunk in model.stream(QUESTION) if chunk.content]
    return {"text": "".join(pieces).strip(), "in_pieces": len(pieces) > 1}


@case
def structured() -> Any:
    """An answer that fits a JSON schema, parsed."""
    schema = {"title": "person", **ASKED["schema"]}
    return model.with_structured_output(schema, method="json_schema").invoke(
        ASKED["messages_for_schema"][-1]["content"]
    )


@case
def tools() -> Any:
    """A call of a tool."""
    (call,) = model.bind_tools(ASKED["tools"]).invoke(ASKED["messages_for_tools"][-1]["content"]).tool_calls
    return {"name": call["name"], "arguments": call["args"]}


@case
def wrong_key() -> Any:
    """A chat with a key that does not exist."""
    stranger = langchain_openai.ChatOpenAI(
        model=ASKED["model"], base_url=f"{ASKED['url']}/v1", api_key="sk-wrong", max_retries=0
    )
    return stranger.invoke(QUESTION)


run()
