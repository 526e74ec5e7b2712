"""Anthropic's client for Python, which sends its key as `x-api-key`."""

from __future__ import annotations

from typing import Any

import anthropic
from cases import ASKED, case, run

client = anthropic.Anthropic(base_url=ASKED["url"], api_key=ASKED["key"], max_retries=0, timeout=120)
MODEL = ASKED["model"]


@case
def message() -> Any:
    """A whole answer."""
    answer = client.messages.create(model=MODEL, max_tokens=200, messages=ASKED["messages"])
    text = "".join(block.text for block in answer.content if block.type == "text")
    usage = answer.usage
    return {"text": text.strip(), "ended": answer.stop_reason, "in": usage.input_tokens, "out": usage.output_tokens}


@case
def stream() -> Any:
    """An answer in pieces; the client puts the message together again."""
    with client.messages.stream(model=MODEL, max_tokens=200, messages=ASKED["messages"]) as events:
        pieces = list(events.text_stream)
        answer = events.get_final_message()
    text, usage = "".join(pieces).strip(), answer.usage
    whole = {"text": text, "ended": answer.stop_reason, "in": usage.input_tokens, "out": usage.output_tokens}
    return whole | {"in_pieces": len(pieces) > 1}


@case
def count_tokens() -> Any:
    """The tokens of a prompt."""
    return client.messages.count_tokens(model=MODEL, messages=ASKED["messages"]).input_tokens


@case
def wrong_key() -> Any:
    """A message with a key that does not exist."""
    return client.with_options(api_key="sk-wrong").messages.create(
        model=MODEL, max_tokens=200, messages=ASKED["messages"]
    )


@case
def unknown_model() -> Any:
    """A message to a model that does not exist."""
    return client.messages.create(model=ASKED["unknown"], max_tokens=200, messages=ASKED["messages"])


run()
