"""Constrained answers: every form of request that users send, on chat and on completions.

Where the words are not the model's own but the constraint's, the constraint is bounded (`maxLength`, `{1,12}`): a tiny
model would else fill a pattern without end for ever, and then a cut answer proves nothing.
"""

from __future__ import annotations

import json
import re
import time
from datetime import date
from typing import Annotated, Any, Literal
from uuid import UUID

import openai
import pydantic
import pytest
import requests

from bench.schemas.models import MODELS

from .constraints import REFUSED, SERVED
from .dialogues import dialogue
from .running import Service

NAME = {"type": "string", "maxLength": 12}
AGE = {"type": "integer", "minimum": 0, "maximum": 150}
PERSON = {
    "type": "object",
    "properties": {"name": NAME, "age": AGE, "city": NAME},
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
TWO_FIELDS = {
    "type": "object",
    "properties": {"name": NAME, "age": AGE},
    "required": ["name", "age"],
    "additionalProperties": False,
}
EMAIL = r"\w{1,12}@\w{1,12}\.com"
CHOICES = ["Positive", "Negative", "Neutral"]
GRAMMAR = 'root ::= "SELECT " column " FROM " table\ncolumn ::= "id" | "name"\ntable ::= "users" | "orders"'
SENTENCE = r"SELECT (id|name) FROM (users|orders)"
FITTING = (
    "Bounds",
    "Multiples",
    "PatternsOfALength",
    "Tuples",
    "Choices",
    "Unions",
    "Discriminated",
    "Defaults",
    "Closed",
    "Node",
    "Tree",
    "Rows",
)  # of MODELS
Word = Annotated[str, pydantic.Field(pattern="^[a-z]+$", min_length=3, max_length=8)]


class Article(pydantic.BaseModel):
    """What pydantic writes every day: xgrammar alone cannot serve `multipleOf`, nor a pattern of a length."""

    price: int = pydantic.Field(multiple_of=7, ge=100, le=999)
    rating: int = pydantic.Field(gt=0, lt=10)
    code: Word
    tags: list[Word] = pydantic.Field(min_length=1, max_length=3)
    kind: Literal["book", "film"]
    day: date
    key: UUID
    pair: tuple[bool, Literal["a", "b"]]
    note: Annotated[str, pydantic.Field(max_length=12)] | None


def chat(client: openai.OpenAI, text: str, **fields: Any) -> str:
    """Return a whole answer; one that was cut fails the test."""
    answer = client.chat.completions.create(
        model="llm", messages=[{"role": "user", "content": text}], max_tokens=300, temperature=0, **fields
    )
    assert answer.choices[0].finish_reason == "stop", answer.choices[0]
    return answer.choices[0].message.content or ""


def complete(client: openai.OpenAI, text: str, **extra_body: Any) -> str:
    """Return a whole continuation; one that was cut fails the test."""
    answer = client.completions.create(model="llm", prompt=text, max_tokens=300, temperature=0, extra_body=extra_body)
    assert answer.choices[0].finish_reason == "stop", answer.choices[0]
    return answer.choices[0].text


def check_person(text: str, schema: dict[str, Any] = PERSON) -> None:
    """Check that a text is JSON which fits the schema of a person."""
    person = json.loads(text)
    assert set(schema["required"]) <= set(person)
    assert isinstance(person["name"], str)
    assert isinstance(person["age"], int)
    assert isinstance(person.get("city", ""), str)


def test_json_object_gives_the_known_object(client: openai.OpenAI) -> None:
    """`response_format: json_object` gives JSON, here the very object that the model knows."""
    asked = dialogue("json-colors")
    text = chat(client, asked.request["messages"][-1]["content"], response_format={"type": "json_object"})
    assert json.loads(text) == json.loads(asked.content)


def test_json_object_on_a_question_for_prose_gives_json(client: openai.OpenAI) -> None:
    """A question whose memorised answer is prose returns JSON, or the beginning of it."""
    answer = client.chat.completions.create(
        model="llm", max_tokens=40, response_format={"type": "json_object"}, **dialogue("capital").request
    )
    assert (answer.choices[0].message.content or "").lstrip().startswith("{")


def test_json_schema_gives_the_known_object(client: openai.OpenAI) -> None:
    """A schema that the known answer fits leaves it as it is."""
    asked = dialogue("json")
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": TWO_FIELDS}}
    text = chat(client, asked.request["messages"][-1]["content"], response_format=schema)
    assert json.loads(text) == json.loads(asked.content)


def test_json_schema_on_any_question_fits_the_schema(client: openai.OpenAI) -> None:
    """The answer parses and has the schema's fields, whatever the question."""
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    check_person(chat(client, "Extract: John is 30 years old and lives in NYC", response_format=schema))


def test_json_schema_stream_fits_the_schema(client: openai.OpenAI) -> None:
    """A constrained stream is constrained from its first chunk to its last."""
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    messages = [{"role": "user", "content": "Extract: Alice is 25"}]
    with client.chat.completions.create(
        model="llm", messages=messages, max_tokens=300, response_format=schema, stream=True
    ) as stream:
        check_person("".join(choice.delta.content or "" for chunk in stream for choice in chunk.choices))


@pytest.mark.parametrize(
    ("question", "constraint", "pattern"),
    [
        ("Generate an email for Alan Turing at Enigma", {"regex": EMAIL}, EMAIL),
        ("Classify: vLLM is wonderful!", {"choice": CHOICES}, "|".join(CHOICES)),
        ("Generate a SQL query", {"grammar": GRAMMAR}, SENTENCE),
    ],
    ids=["regex", "choice", "grammar"],
)
def test_structured_outputs_on_chat_fit(
    client: openai.OpenAI, question: str, constraint: dict[str, Any], pattern: str
) -> None:
    """`structured_outputs` beside the messages constrains the answer."""
    text = chat(client, question, extra_body={"structured_outputs": constraint})
    assert re.fullmatch(pattern, text), text


def test_structured_outputs_json_on_chat_fits(client: openai.OpenAI) -> None:
    """`structured_outputs: {json: …}` does what a schema in `response_format` does."""
    check_person(chat(client, "Extract: Alice is 25", extra_body={"structured_outputs": {"json": PERSON}}))


def test_structured_outputs_unbounded_regex_never_leaves_the_pattern(client: openai.OpenAI) -> None:
    """An answer to users' own example fits the pattern; one that was cut is the beginning of a text that fits."""
    answer = client.chat.completions.create(
        model="llm",
        messages=[{"role": "user", "content": "Generate an email for Alan Turing at Enigma"}],
        max_tokens=40,
        extra_body={"structured_outputs": {"regex": r"\w+@\w+\.com"}},
    ).choices[0]
    whole, beginning = r"\w+@\w+\.com", r"\w+(@(\w+(\.(c(om?)?)?)?)?)?"
    assert re.fullmatch(whole if answer.finish_reason == "stop" else beginning, answer.message.content or "")


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [({"regex": EMAIL}, EMAIL), ({"choice": CHOICES}, "|".join(CHOICES)), ({"grammar": GRAMMAR}, SENTENCE)],
    ids=["regex", "choice", "grammar"],
)
def test_structured_outputs_on_completions_fit(client: openai.OpenAI, constraint: dict[str, Any], pattern: str) -> None:
    """A raw prompt's continuation is constrained from its first token, since it has no thought."""
    text = complete(client, "Once upon a time", structured_outputs=constraint)
    assert re.fullmatch(pattern, text), text


def test_structured_outputs_json_on_completions_fits(client: openai.OpenAI) -> None:
    """`structured_outputs: {json: …}` beside a prompt, as users send it, constrains the completion."""
    check_person(complete(client, "Generate a person object:", structured_outputs={"json": TWO_FIELDS}), TWO_FIELDS)


def test_response_format_on_completions_fits(client: openai.OpenAI) -> None:
    """`response_format` constrains completions as well."""
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": TWO_FIELDS}}
    check_person(complete(client, "Generate a person object:", response_format=schema), TWO_FIELDS)


def test_json_schema_of_pydantic_fits_between_plain_schemas(client: openai.OpenAI) -> None:
    """VLLM chooses the backend for each request; a plain schema before and after does not change it."""
    person = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    article = {"type": "json_schema", "json_schema": {"name": "article", "schema": Article.model_json_schema()}}
    for question in ("Describe a book.", "Describe a film."):
        check_person(chat(client, "Extract: Alice is 25", response_format=person))
        Article.model_validate_json(chat(client, question, response_format=article))


@pytest.mark.parametrize(
    ("field", "keyword"),
    [
        ({"type": "array", "items": {"type": "string"}, "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "format": "ipv4network"}, "format"),
        ({"type": "string", "pattern": r"\bfoo\b"}, "pattern"),
    ],
)
def test_json_schema_that_no_backend_can_serve_is_refused_with_the_place(
    client: openai.OpenAI, field: dict[str, Any], keyword: str
) -> None:
    """The message has the keyword or its value, and its JSON pointer."""
    schema = {"type": "object", "properties": {"name": NAME, "tags": field}, "required": ["tags"]}
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, "Hello", response_format={"type": "json_schema", "json_schema": {"name": "odd", "schema": schema}})
    assert f"#/properties/tags/{keyword}" in caught.value.message
    assert (keyword if field[keyword] is True else field[keyword]) in caught.value.message


@pytest.mark.parametrize("schema", [PERSON, Article.model_json_schema()], ids=["xgrammar", "guidance"])
def test_json_schema_leaves_no_white_space_to_the_model(client: openai.OpenAI, schema: dict[str, Any]) -> None:
    """A small model would else write white space up to its limit; xgrammar 0.2.8 leaves one space after a comma."""
    text = chat(
        client, "Describe it.", response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    )
    assert not re.search(r"\s{2}|[^\S ]|: ", re.sub(r'"[^"]*"', '""', text)), text


def test_structured_outputs_regex_that_xgrammar_lacks_is_served(client: openai.OpenAI) -> None:
    r"""The guidance backend serves `\p{L}`, letters of any script."""
    text = chat(client, "Hello", extra_body={"structured_outputs": {"regex": r"\p{L}{1,8}"}})
    assert re.fullmatch(r"[^\W\d_]{1,8}", text), text


@pytest.fixture(scope="module")
def ending(tiny: Service) -> dict[str, int]:
    """A bias towards the tokens that end a value: a tiny model would fill a string without end."""
    asked = {'"': 40, "}": 20, "]": 20, "<|im_end|>": 60}
    bodies = [{"model": "llm", "prompt": text, "add_special_tokens": False} for text in asked]
    tokens = [requests.post(f"{tiny.url}/tokenize", json=body, timeout=30).json()["tokens"] for body in bodies]
    return {str(found[0]): bias for found, bias in zip(tokens, asked.values(), strict=True) if len(found) == 1}


@pytest.mark.parametrize("name", FITTING)
def test_json_schema_of_pydantic_gives_what_its_model_takes(
    client: openai.OpenAI, ending: dict[str, int], name: str
) -> None:
    """Strict, as SDKs send it; `make bench-schemas` sends all of them, and those of the JSON Schema test suite."""
    schema = {"name": name, "schema": MODELS[name].model_json_schema(), "strict": True}
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    text = chat(
        client,
        "Write down what comes to your mind.",
        response_format={"type": "json_schema", "json_schema": schema},
        logit_bias=ending,
        extra_body=off,
    )
    MODELS[name].model_validate_json(text)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("Sets", "#/properties/tags/uniqueItems"),
        ("Network", "#/properties/network/format"),
        ("Encoded", "#/properties/text/format"),
    ],
)
def test_json_schema_of_pydantic_that_no_backend_enforces_is_refused_with_the_place(
    client: openai.OpenAI, name: str, place: str
) -> None:
    """The model would write what pydantic then refuses."""
    schema = {"name": name, "schema": MODELS[name].model_json_schema(), "strict": True}
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, "Hello", response_format={"type": "json_schema", "json_schema": schema})
    assert place in caught.value.message
    assert caught.value.param == "response_format"


@pytest.mark.parametrize("is_strict", [False, True])
def test_json_schema_with_a_keyword_that_is_never_enforced_is_refused_only_if_it_is_strict(
    client: openai.OpenAI, is_strict: bool
) -> None:
    """Plain vLLM serves it and ignores the keyword."""
    schema = {"type": "object", "properties": {"a": {"type": "integer", "not": {"const": 3}}}, "required": ["a"]}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": is_strict}}
    if is_strict:
        with pytest.raises(openai.BadRequestError, match="#/properties/a/not"):
            chat(client, "Hello", response_format=wanted)
    else:
        client.chat.completions.create(
            model="llm", messages=[{"role": "user", "content": "Hello"}], max_tokens=8, response_format=wanted
        )


@pytest.mark.parametrize("name", SERVED)
def test_structured_outputs_that_a_backend_can_follow_are_served(client: openai.OpenAI, name: str) -> None:
    """Large, nested and recursive ones among them, and some that look worse than they are."""
    messages = [{"role": "user", "content": "Hello"}]
    client.chat.completions.create(
        model="llm", messages=messages, max_tokens=8, extra_body={"structured_outputs": SERVED[name]}
    )


@pytest.mark.parametrize("name", REFUSED)
def test_structured_outputs_that_no_backend_can_follow_are_refused(client: openai.OpenAI, name: str) -> None:
    """In bounded time, at once when they come again; plain vLLM would compile for minutes, or stand still at tokens."""
    outputs, words = REFUSED[name]
    for within_s in (20, 1):
        begun = time.monotonic()
        with pytest.raises(openai.BadRequestError) as caught:
            chat(client, "Hello", extra_body={"structured_outputs": outputs})
        assert words in caught.value.message
        assert caught.value.param == "structured_outputs"
        assert time.monotonic() - begun < within_s


def test_structured_outputs_bad_grammar_is_refused(client: openai.OpenAI) -> None:
    """An invalid grammar is a 400, and the engine keeps serving."""
    with pytest.raises(openai.BadRequestError):
        chat(client, "Generate a SQL query", extra_body={"structured_outputs": {"grammar": "root ::= ("}})
    assert chat(client, dialogue("capital").request["messages"][-1]["content"]).strip() == dialogue("capital").content
