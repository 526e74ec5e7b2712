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
    answer = client.messages.create(model=MODEL, max_tokens=1000, messages=ASKED["messages"])
    text = "".join(block.text for block in answer.content if block.type == "text")
    usage = answer.usage
    return {"text": text.strip(), "ended": answer.stop_reason, "in": usage.input_tokens, "out": usage.output_tokens}


@case
def stream() -> Any:
    """An answer in pieces; the client puts the message together again."""
    with client.messages.stream(model=MODEL, max_tokens=1000, messages=ASKED["messages"]) as events:
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
def models() -> Any:
    """The names of all models, each asked for alone."""
    entries = [client.models.retrieve(model.id) for model in client.models.list()]
    return [entry.id for entry in entries if entry.display_name and entry.created_at.year]


@case
def wrong_key() -> Any:
    """A message with a key that does not exist."""
    return client.with_options(api_key="sk-wrong").messages.create(
        model=MODEL, max_tokens=1000, messages=ASKED["messages"]
    )


@case
def unknown_model() -> Any:
    """A message to a model that does not exist."""
    return client.messages.create(model=ASKED["unknown"], max_tokens=1000, messages=ASKED["messages"])


@case
def broken_model() -> Any:
    """A message to a model that cannot start, with the retries that every client makes by default."""
    return client.with_options(max_retries=2).messages.create(
        model=ASKED["broken"], max_tokens=1000, messages=ASKED["messages"]
    )


@case
def too_long() -> Any:
    """A message that is longer than the model's context; what agents look at."""
    try:
        return client.messages.create(model=MODEL, max_tokens=1000, messages=ASKED["messages_too_long"])
    except anthropic.BadRequestError as error:
        return {"type": error.type, "message": error.api_message, "request_id": error.request_id, "body": error.body}


run()
