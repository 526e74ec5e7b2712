"""What other clients do: curl, the Responses API, Anthropic's messages, tokens."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import openai
import pytest
import requests

from service.gateway import openapi
from service.gateway.request_examples import EXAMPLES
from tests.described import answer_schema, faults

from .dialogues import TINY, dialogue
from .running import Service

CAPITAL = dialogue("capital")
QUESTION = CAPITAL.request["messages"][-1]["content"]
# The examples that a small text model can answer.
OTHERS = {"/v1/embeddings", "/v1/rerank", "/v1/score", "/classify"}
TRIED = [
    (path, name)
    for path, found in EXAMPLES.items()
    for name, body in found.items()
    if body["model"] == "llm" and path not in OTHERS
]


def curl(*arguments: str) -> str:
    """Return what curl prints; any status but success fails."""
    command = ["curl", "--silent", "--show-error", "--fail-with-body", "--max-time", "60", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def post(service: Service, path: str, **body: Any) -> Any:
    """Post JSON and return the JSON of a good answer."""
    answer = requests.post(service.url + path, json={"model": "llm", **body}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_curl_health_is_ok(tiny: Service) -> None:
    """The body of `/health` is what monitors compare with."""
    assert curl(f"{tiny.url}/health") == '{"status":"ok"}'


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
def test_service_is_on_both_loopbacks(tiny: Service, host: str) -> None:
    """`localhost` is ::1 for Node."""
    assert curl(f"http://{host}:{tiny.port}/health") == '{"status":"ok"}'


def test_curl_models_lists_them(tiny: Service) -> None:
    """`/v1/models` has `llm` first, then its model, then all others, each with its state."""
    listed = json.loads(curl(f"{tiny.url}/v1/models"))["data"]
    assert [(model["id"], model["state"]) for model in listed[:2]] == [("llm", "ready"), ("tiny", "ready")]
    assert {"qwen3-8b", "qwen3-0.6b"} <= {model["id"] for model in listed if model["state"] == "cold"}


def test_curl_docs_is_a_page(tiny: Service) -> None:
    """`/docs` is a page for browsers, `/openapi.json` a document for programs, plain unless gzip is asked for."""
    assert "swagger-ui" in curl(f"{tiny.url}/docs")
    assert "/v1/chat/completions" in json.loads(curl(f"{tiny.url}/openapi.json"))["paths"]


@pytest.mark.parametrize(("path", "name"), TRIED)
def test_example_of_the_docs_is_answered_as_its_document_says(tiny: Service, path: str, name: str) -> None:
    """What `Try it out` begins with works, and answer and events have the fields of vLLM's schemas and no other."""
    body, document = EXAMPLES[path][name], json.loads(openapi.document())
    answer = requests.post(tiny.url + path, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    media_type = answer.headers["content-type"].partition(";")[0]
    schema = answer_schema(document, "POST", path, 200, media_type)
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    for value in map(json.loads, events if body.get("stream") else [answer.text]):
        assert faults(document, schema, value) == []


def test_curl_metrics_count(tiny: Service) -> None:
    """`/metrics` has the gateway's counters, and with a model's name vLLM's own; that of a cold model wakes nothing."""
    assert "gateway_requests_total" in curl(f"{tiny.url}/metrics")
    assert "vllm:generation_tokens_total" in curl(f"{tiny.url}/metrics?model=tiny")
    assert requests.get(f"{tiny.url}/metrics?model=qwen3-8b", timeout=30).status_code == 404


def test_curl_chat_of_the_greeting_answers(tiny: Service) -> None:
    """The command that the start prints returns the answer when it is pasted into a shell."""
    pasted = tiny.out[tiny.out.index("curl ") : tiny.out.index("\n\nfrom openai")]
    answer = subprocess.run(["bash", "-c", pasted], check=True, capture_output=True, text=True).stdout
    assert json.loads(answer)["choices"][0]["message"]["content"].strip() == CAPITAL.content


def test_curl_that_offers_http_2_gets_its_answer(tiny: Service) -> None:
    """The offer is ignored and the body read; Java's client and what is built on it offer it with each POST."""
    body = json.dumps({"model": "llm", **CAPITAL.request})
    answer = curl("--http2", f"{tiny.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body)
    assert json.loads(answer)["choices"][0]["message"]["content"].strip() == CAPITAL.content


def test_curl_without_buffer_streams_events(tiny: Service) -> None:
    """`curl -N` sees one event a line and `[DONE]` at the end."""
    body = json.dumps({"model": "llm", "stream": True, **CAPITAL.request})
    out = curl("-N", f"{tiny.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body)
    events = [line.removeprefix("data: ") for line in out.splitlines() if line]
    assert events[-1] == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1]]
    assert "".join(deltas).strip() == CAPITAL.content


def test_responses_returns_the_known_answer(client: openai.OpenAI) -> None:
    """`client.responses.create` answers."""
    answer = client.responses.create(model="llm", input=QUESTION)
    assert answer.status == "completed"
    assert answer.output_text.strip() == CAPITAL.content


def test_responses_stream_returns_the_same_answer(client: openai.OpenAI) -> None:
    """The text deltas of a streamed response add up, and the last event says that it is complete."""
    with client.responses.create(model="llm", input=QUESTION, stream=True) as stream:
        events = list(stream)
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas).strip() == CAPITAL.content
    assert events[-1].type == "response.completed"


def test_messages_returns_the_known_answer(tiny: Service) -> None:
    """Anthropic's shape of a chat is answered in Anthropic's shape."""
    answer = post(tiny, "/v1/messages", max_tokens=200, messages=CAPITAL.request["messages"])
    assert answer["type"] == "message"
    assert answer["stop_reason"] == "end_turn"
    said = [block["text"] for block in answer["content"] if block["type"] == "text"]
    assert "".join(said).strip() == CAPITAL.content


def test_messages_count_tokens_counts(tiny: Service) -> None:
    """The count is that of the prompt."""
    messages = CAPITAL.request["messages"]
    counted = post(tiny, "/v1/messages/count_tokens", messages=messages)["input_tokens"]
    assert counted == post(tiny, "/v1/chat/completions", messages=messages)["usage"]["prompt_tokens"]


def test_tokenize_and_back_gives_the_text(tiny: Service) -> None:
    """A text becomes tokens and the tokens the text, beyond ASCII too."""
    text = dialogue("hello-japanese").content
    tokens = post(tiny, "/tokenize", prompt=text)
    assert tokens["count"] == len(tokens["tokens"])
    assert post(tiny, "/detokenize", tokens=tokens["tokens"])["prompt"] == text


def test_tokenize_chat_counts_as_the_chat_does(tiny: Service) -> None:
    """Tokenizing messages applies the template."""
    messages = CAPITAL.request["messages"]
    counted = post(tiny, "/tokenize", messages=messages)["count"]
    assert counted == post(tiny, "/v1/chat/completions", messages=messages)["usage"]["prompt_tokens"]


def test_bad_request_is_400_in_openais_shape(tiny: Service) -> None:
    """An invalid request gets OpenAI's error, and the service keeps serving."""
    answer = requests.post(f"{tiny.url}/v1/chat/completions", json={"model": "llm", "messages": "hello"}, timeout=60)
    assert answer.status_code == 400
    assert set(answer.json()["error"]) >= {"message", "type", "param", "code"}


def test_served_model_is_the_packaged_one(tiny: Service) -> None:
    """The engine reads the model's own directory."""
    assert f"--model {TINY}" in " ".join(tiny.leader().cmdline())
