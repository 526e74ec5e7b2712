"""Tests a service from outside, as its clients use it: one check after the other, each with its figure.

Any gateway can be tested: a deployed one, or that of `vllm-service up`. The check `wake` waits for a GPU.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from service.errors import ServiceError
from service.modal_app import gateway_check
from service.modal_app.selftest import CHARACTERS, CONTENT

MAX_TOKENS = 1024  # enough for the thoughts of a reasoning model before a short answer
_SHARE_OF_CONTEXT = 4  # at most a quarter of it
_SENTIMENTS = ["Positive", "Negative", "Neutral"]
_CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
_WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Get the current weather in a city.", "parameters": _CITY},
}
_PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 40}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
_NO_THOUGHTS = {"chat_template_kwargs": {"enable_thinking": False}}  # templates that know no thoughts ignore it
_CONVERSATIONS = dict(zip(("pirate", "Jar Jar"), CHARACTERS, strict=True))


@dataclass(frozen=True)
class Figure:
    """What a check that went well found.

    Attributes:
        tokens_per_second: Of the answer; of a stream after its first token.
    """

    text: str = ""
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class Check:
    """The outcome of one check; `error` is None where it went well."""

    name: str
    seconds: float
    figure: Figure = Figure()
    error: ServiceError | None = None


@dataclass(frozen=True)
class Service:
    """A service and the model by which it is tested.

    Attributes:
        key: Empty: it needs none.
        model: As a request names it.
        timeout_s: How long the service may be silent: a boot at most.
    """

    url: str
    key: str
    model: str
    timeout_s: float

    def chat(self, question: str, limit: int, **fields: Any) -> Any:
        """Return the first choice of an answer, and how many tokens it has."""
        answer = gateway_check.answer(self.url, self.key, self._body([_user(question)], limit, fields), self.timeout_s)
        return answer["choices"][0]["message"], int(answer["usage"]["completion_tokens"])

    def stream(self, messages: list[dict[str, str]], limit: int) -> Figure:
        """Read a stream to its end.

        Raises:
            ServiceError: It failed, or was empty.
        """
        body = self._body(messages, limit, {"stream_options": {"include_usage": True}})
        began, first, tokens = time.monotonic(), None, 0
        for event in gateway_check.stream(self.url, self.key, body, self.timeout_s):
            if first is None and any(gateway_check.text_of(choice["delta"]).strip() for choice in event["choices"]):
                first = time.monotonic()
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        if first is None:
            raise self.wrong("the stream had no text")
        return Figure(f"first token {first - began:.2f} s", _rate(tokens - 1, time.monotonic() - first))

    def wrong(self, what: str) -> ServiceError:
        """Return the error of an answer that is not what was asked for."""
        return ServiceError(
            f"Model '{self.model}' answered, but {what}.", hint=f"Read its log: vllm-service logs {self.model}."
        )

    def _body(self, messages: list[dict[str, str]], limit: int, fields: dict[str, Any]) -> dict[str, Any]:
        return {"model": self.model, "messages": messages, "max_tokens": limit, **fields}


def run(service: Service, on_wake: Callable[[dict[str, Any]], None]) -> Iterator[Check]:
    """Yield the checks as they end; where none of the later ones could go well, they are left out.

    Args:
        service: What to test.
        on_wake: Called before a GPU is woken, with the model as `GET /v1/models/{id}` describes it.
    """
    found: dict[str, Any] = {}
    for name, check in (
        ("health", partial(_health, service)),
        ("models", partial(_models, service, found)),
        ("wake", partial(_wake, service, found, on_wake)),
    ):
        yield (done := _checked(name, check, service))
        if done.error:
            return
    limit = min(MAX_TOKENS, int(found["max_model_len"] or MAX_TOKENS) // _SHARE_OF_CONTEXT)
    for name, check in (
        ("chat", partial(_chat, service, limit)),
        ("stream", partial(service.stream, [_user(gateway_check.QUESTION)], limit)),
        ("JSON schema", partial(_schema, service, limit)),
        ("choice", partial(_choice, service, limit)),
        ("tool", partial(_tool, service, limit)),
        *(
            (title, partial(service.stream, [{"role": "system", "content": character}, _user(CONTENT)], limit))
            for title, character in _CONVERSATIONS.items()
        ),
    ):
        yield _checked(name, check, service)


def _checked(name: str, check: Callable[[], Figure], service: Service) -> Check:
    began = time.monotonic()
    try:
        figure = check()
    except ServiceError as error:
        return Check(name, time.monotonic() - began, error=error)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        wrong = service.wrong(f"not in the shape of OpenAI's API: {error!r}")
        return Check(name, time.monotonic() - began, error=wrong)
    return Check(name, time.monotonic() - began, figure)


def _health(service: Service) -> Figure:
    gateway_check.health(service.url)
    return Figure()


def _models(service: Service, found: dict[str, Any]) -> Figure:
    listed = gateway_check.models(service.url, service.key)
    found |= gateway_check.model(service.url, service.key, service.model)
    return Figure(f"{len(listed)} names; {service.model} on {found['gpu']} is {found['state']}")


def _wake(service: Service, found: dict[str, Any], on_wake: Callable[[dict[str, Any]], None]) -> Figure:
    if found["state"] == "does_not_fit":
        raise ServiceError(str(found["reason"]), hint="Name another GPU: --gpu G.")
    if found["state"] != "ready":
        on_wake(found)
    body = {"model": service.model, "messages": [_user("Hello!")], "max_tokens": 1}
    for _ in gateway_check.stream(service.url, service.key, body, service.timeout_s):
        pass
    return Figure("" if found["state"] == "ready" else f"from {found['state']}")


def _chat(service: Service, limit: int) -> Figure:
    began = time.monotonic()
    message, tokens = service.chat(gateway_check.QUESTION, limit)
    if not gateway_check.text_of(message).strip():
        raise service.wrong("with an empty message")
    return Figure(f"{tokens} tokens", _rate(tokens, time.monotonic() - began))


def _schema(service: Service, limit: int) -> Figure:
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": _PERSON}}
    question = "Give me a JSON object with name and age for John, 30 years old."
    message, _ = service.chat(question, limit, response_format=schema, **_NO_THOUGHTS)
    text = message.get("content") or ""
    try:
        person = json.loads(text)
        fits = isinstance(person["name"], str) and isinstance(person["age"], int) and len(person) == 2
    except (ValueError, KeyError, TypeError):
        fits = False
    if not fits:
        raise service.wrong(f"with '{_short(text)}', which the schema does not allow")
    return Figure(_short(text))


def _choice(service: Service, limit: int) -> Figure:
    question = "Classify the sentiment as Positive, Negative or Neutral: vLLM is wonderful!"
    message, _ = service.chat(question, limit, structured_outputs={"choice": _SENTIMENTS}, **_NO_THOUGHTS)
    if (text := message.get("content") or "") not in _SENTIMENTS:
        raise service.wrong(f"with '{_short(text)}', which is none of {', '.join(_SENTIMENTS)}")
    return Figure(text)


def _tool(service: Service, limit: int) -> Figure:
    named = {"type": "function", "function": {"name": "get_weather"}}
    question = "What is the weather in Paris?"
    message, _ = service.chat(question, limit, tools=[_WEATHER], tool_choice=named, **_NO_THOUGHTS)
    calls = message.get("tool_calls") or [None]
    call = calls[0]["function"] if calls[0] else {}
    try:
        city = json.loads(call["arguments"])["city"]
    except (ValueError, KeyError, TypeError):
        raise service.wrong(f"with {_short(str(message))} in place of a call of get_weather with a city") from None
    return Figure(f"{call['name']}({_short(str(city))})")


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _rate(tokens: int, seconds: float) -> float | None:
    return round(tokens / seconds, 1) if tokens > 0 and seconds > 0 else None


def _short(text: str, most: int = 40) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
