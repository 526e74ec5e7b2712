"""OpenAI's client for Python."""

from __future__ import annotations

import json
import time
from typing import Any

import openai
from cases import ASKED, case, run

client = openai.OpenAI(base_url=f"{ASKED['url']}/v1", api_key=ASKED["key"], max_retries=0, timeout=120)
MODEL, PERSON = ASKED["model"], {"name": "person", "schema": ASKED["schema"]}


@case
def chat() -> Any:
    """A whole answer."""
    answer = client.chat.completions.create(model=MODEL, messages=ASKED["messages"])
    return {
        "text": answer.choices[0].message.content.strip(),
        "ended": answer.choices[0].finish_reason,
        "tokens": answer.usage.completion_tokens,
    }


@case
def stream() -> Any:
    """An answer in pieces, with the count of its tokens."""
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=ASKED["messages"], stream=True, stream_options={"include_usage": True}
        )
    )
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    ends = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    return {
        "text": "".join(pieces).strip(),
        "ended": ends[-1],
        "tokens": chunks[-1].usage.completion_tokens,
        "in_pieces": len([piece for piece in pieces if piece]) > 1,
    }


@case
def completion() -> Any:
    """A prompt continued."""
    answer = client.completions.create(model=MODEL, prompt=ASKED["prompt"], max_tokens=100)
    return answer.choices[0].text


@case
def completion_stream() -> Any:
    """A prompt continued, in pieces."""
    chunks = client.completions.create(model=MODEL, prompt=ASKED["prompt"], max_tokens=100, stream=True)
    return "".join(choice.text or "" for chunk in chunks for choice in chunk.choices)


@case
def schema() -> Any:
    """An answer that fits a JSON schema."""
    answer = client.chat.completions.create(
        model=MODEL,
        messages=ASKED["messages_for_schema"],
        response_format={"type": "json_schema", "json_schema": PERSON},
    )
    return json.loads(answer.choices[0].message.content)


@case
def choice() -> Any:
    """One of some given answers."""
    answer = client.chat.completions.create(
        model=MODEL,
        messages=ASKED["messages_for_choice"],
        extra_body={"structured_outputs": {"choice": ASKED["choices"]}},
    )
    return answer.choices[0].message.content


@case
def tools() -> Any:
    """A call of a tool."""
    answer = client.chat.completions.create(
        model=MODEL, messages=ASKED["messages_for_tools"], tools=ASKED["tools"], tool_choice="auto"
    )
    (call,) = answer.choices[0].message.tool_calls
    return {"name": call.function.name, "arguments": json.loads(call.function.arguments)}


@case
def models() -> Any:
    """The names of all models, each asked for alone."""
    return [client.models.retrieve(model.id).id for model in client.models.list()]


@case
def wrong_key() -> Any:
    """A chat with a key that does not exist."""
    return client.with_options(api_key="sk-wrong").chat.completions.create(model=MODEL, messages=ASKED["messages"])


@case
def unknown_model() -> Any:
    """A chat with a model that does not exist."""
    return client.chat.completions.create(model=ASKED["unknown"], messages=ASKED["messages"])


@case
def broken_model() -> Any:
    """A chat with a model that cannot start, with the retries that every client makes by default."""
    return client.with_options(max_retries=2).chat.completions.create(model=ASKED["broken"], messages=ASKED["messages"])


@case
def too_long() -> Any:
    """A chat that is longer than the model's context; what agents look at."""
    try:
        return client.chat.completions.create(model=MODEL, messages=ASKED["messages_too_long"])
    except openai.BadRequestError as error:
        return {"code": error.code, "type": error.type, "param": error.param}


@case
def batch() -> Any:
    """A file of requests, answered in the background, and everything about it that the client reads."""
    body = {"model": MODEL, "messages": ASKED["messages"]}
    url = "/v1/chat/completions"
    lines = [{"custom_id": name, "method": "POST", "url": url, "body": body} for name in ("a", "b", "c")]
    content = "\n".join([*map(json.dumps, lines), "nonsense"]).encode()
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    made = client.batches.create(input_file_id=file.id, endpoint=url, completion_window="24h", metadata={"k": "v"})
    listed = made.id in [one.id for one in client.batches.list(limit=1)]
    while (done := client.batches.retrieve(made.id)).status != "completed":
        time.sleep(0.1)
    answers = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
    (error,) = [json.loads(line) for line in client.files.content(done.error_file_id).text.splitlines()]
    deleted = [client.files.delete(name).deleted for name in (file.id, done.output_file_id, done.error_file_id)]
    return {
        "listed": listed,
        "counts": [done.request_counts.total, done.request_counts.completed, done.request_counts.failed],
        "ids": sorted(one["custom_id"] for one in answers),
        "texts": [one["response"]["body"]["choices"][0]["message"]["content"].strip() for one in answers],
        "error": [error["error"]["line"], error["error"]["code"]],
        "metadata": done.metadata,
        "deleted": all(deleted),
    }


run()
