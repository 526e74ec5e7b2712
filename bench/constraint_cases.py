"""Constraints that cost vLLM far more than their size, and every place of a request where each can stand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Body = dict[str, Any]
CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
PROMPT = "Write down what comes to your mind, please."
TOKENS = 24  # that an answer may have: what follows a grammar slowly shows by then


def _object(**properties: Any) -> Body:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def _pattern(text: str) -> Body:
    return _object(a={"type": "string", "pattern": text})


def _nested(inner: Body, levels: int, *around: str) -> Body:
    for level in range(levels):
        inner = {around[level % len(around)]: inner}
    return inner


def _counted(prefix: str, count: int) -> Body:
    return {"type": "object", "properties": {f"{prefix}{i}": {} for i in range(count)}, "minProperties": 1}


def _lists(levels: int, most: int) -> Body:
    schema: Body = {"type": "string", "maxLength": most}
    for _ in range(levels):
        schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": most}
    return schema


def _product(factors: int, choices: int) -> Body:
    return {"allOf": [{"anyOf": [_object(**{f"p{i}_{j}": {}}) for j in range(choices)]} for i in range(factors)]}


def _tag(tags: int, schema: Body) -> str:
    items = [
        {"begin": f"<f{i}>", "content": {"type": "json_schema", "json_schema": schema}, "end": "</f>"}
        for i in range(tags)
    ]
    return json.dumps(
        {"type": "structural_tag", "format": {"type": "triggered_tags", "triggers": ["<f"], "tags": items}}
    )


def _sequence(elements: int, pattern: str) -> str:
    parts = [{"type": "regex", "pattern": pattern}] * elements
    return json.dumps({"type": "structural_tag", "format": {"type": "sequence", "elements": parts}})


_COMMON = "the same beginning of every choice, which is long enough to be compared many times "
# kind -> name -> constraint
BOMBS: dict[str, dict[str, Any]] = {
    "regex": {
        "words of several readings": "(a|b|ab|ba){0,1000}",
        "nested counts": "((x{0,100}){0,100}){0,100}",
        "nested counts of classes": "([a-z0-9_.]{1,1000}x?){1,1000}",
        "optional separator": "([a-z]{1,30} ?){1,30}",
        "counts of everything": "(.{0,99}){0,99}",
        "Unicode classes": r"(\p{L}|\p{N}|[^\x00-\x7f]){1,2000}",
        "Unicode range": "[\u0080-\uffff]{1,10000}",
        "optional letters": "(a?){500}a{500}",
        "exponential automaton": "(a|b)*a(a|b){300}",
        "stars of stars": "((a*)*)*b",
        "one star after the other": ".*a" * 200,
        "5,000 words": "|".join(f"{_COMMON[:8]}{i}" for i in range(5000)),
        "count of nine digits": "a{999999999}",
        "5,000 parentheses": "(" * 5000 + "a" + ")" * 5000,
    },
    "grammar": {
        "rule of itself alone": "root ::= root",
        "rules of each other": "root ::= a\na ::= b\nb ::= root",
        "nothing, in every way": 'root ::= root root | "" | "a"',
        "sum of sums": 'root ::= root "+" root | "a"',
        "nested counts": "root ::= (([a-z] [a-z]?){1,1000}){1,1000}",
        "counts of counts of counts": 'root ::= ((("a"{0,1000}){0,1000}){0,1000}){0,1000}',
        "2 to the 40": "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1} r{i + 1}\n" for i in range(40)) + 'r40 ::= "b"',
        "2 to the 40 choices": "root ::= r0\n"
        + "".join(f'r{i} ::= r{i + 1} | "a" r{i + 1}\n' for i in range(40))
        + 'r40 ::= "b"',
        "3,000 rules": "root ::= r0\n" + "".join(f'r{i} ::= "{i}" r{i + 1}?\n' for i in range(3000)) + 'r3000 ::= "b"',
        "look-ahead at everything": 'root ::= ([a-z]+ [a-z]* [a-z]?){0,50} "!"',
        "Lark: nested counts": "start: ((A B?)~1..1000)~1..1000\nA: /[a-z]/\nB: /[a-z]/",
        "Lark: deep schema": "start: %json " + '{"items":' * 5000 + "{}" + "}" * 5000,
        "Lark: exponential automaton": "start: /(a|b)*a(a|b){300}/",
        "Lark: rule of itself alone": "start: start",
    },
    "choice": {
        "10,000 choices": [f"{_COMMON[:9]}{i}" for i in range(10_000)],
        "2,000 long choices": [f"{_COMMON}{i}" for i in range(2000)],
        "choices of each other's beginning": ["a" * i for i in range(1, 700)],
    },
    "json": {
        "reference to itself": {"$ref": "#"},
        "references to each other": {
            "$ref": "#/$defs/a",
            "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]}, "b": {"anyOf": [{"$ref": "#/$defs/a"}]}},
        },
        "10,000 values": {"enum": [f"value {i}" for i in range(10_000)]},
        "2,000 long values": {"enum": [f"{_COMMON}{i}" for i in range(2000)]},
        "1,000 optional properties": {"type": "object", "properties": {f"p{i}": {} for i in range(1000)}},
        "2,000 optional properties": {"type": "object", "properties": {f"p{i}": {} for i in range(2000)}},
        "100 counted properties": _counted("p", 100),
        "12 times 99 counted properties": {"anyOf": [_counted(f"p{j}_", 99) for j in range(12)]},
        "product of choices": _product(10, 4),
        "5,000 choices of objects": {"anyOf": [_object(**{f"p{i}": {}}) for i in range(5000)]},
        "63 levels of anyOf": _nested({"type": "string"}, 62, "items"),
        "levels of anyOf": json.loads('{"anyOf":[' * 15 + '{"type":"string"},{"type":"null"}' + "]}" * 15),
        "lists of lists of lists": _lists(4, 10_000),
        "string of a million": _object(a={"type": "string", "maxLength": 1_000_000}),
        "additional properties of many": {
            "type": "object",
            "patternProperties": {f"^p{i}[a-z]*$": {"type": "integer"} for i in range(200)},
            "additionalProperties": {"type": "array", "items": _counted("p", 60)},
        },
        "names of a pattern": {"type": "object", "propertyNames": {"pattern": "^([a-z]{1,30}_?){1,30}$"}},
        "tree of many branches": {
            "$ref": "#/$defs/n",
            "$defs": {"n": {"anyOf": [_object(**{f"k{i}": {"$ref": "#/$defs/n"}}) for i in range(300)]}},
        },
        "pattern: words of several readings": _pattern("^(a|b|ab|ba){0,1000}$"),
        "pattern: nested counts": _pattern("^(([a-z]{1,99}){1,99}){1,99}$"),
        "pattern: optional separator": _pattern("^([a-z]{1,30} ?){1,30}$"),
        "pattern: Unicode classes": _pattern(r"^(\p{L}|\p{N}){1,2000}$"),
        "pattern: counts of everything": _pattern("^(.{0,99}){0,99}$"),
        "100 patterns": _object(**{f"p{i}": {"type": "string", "pattern": "^(a|b)*a(a|b){30}$"} for i in range(100)}),
        "bounds of 15 digits": _object(**{f"p{i}": {"type": "integer", "minimum": -(10**15) + i} for i in range(200)}),
        "multiple of a millionth": _object(a={"type": "number", "multipleOf": 0.000001, "minimum": 0, "maximum": 1e6}),
    },
    "structural_tag": {
        "200 tags of 60 counted properties": _tag(200, _counted("p", 60)),
        "400 tags of one schema": _tag(400, _object(a={"type": "string", "maxLength": 1000})),
        "sequence of ambiguous parts": _sequence(100, "[a-z]{0,50} ?"),
        "tags of a pattern": _tag(20, _pattern("^(([a-z]{1,99}){1,99}){1,99}$")),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a constraint stands.

    Attributes:
        name: Protocol and field.
        path: The route.
        kinds: What can stand there.
        body: Makes the body of a request of a kind and a constraint.
    """

    name: str
    path: str
    kinds: tuple[str, ...]
    body: Callable[[str, Any], Body]


def _chat(**fields: Any) -> Body:
    return {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": TOKENS, **fields}


def _completion(**fields: Any) -> Body:
    return {"prompt": PROMPT, "max_tokens": TOKENS, **fields}


def _response(**fields: Any) -> Body:
    return {"input": PROMPT, "max_output_tokens": TOKENS, **fields}


def _response_format(kind: str, value: Any) -> Body:
    if kind == "structural_tag":
        return {"response_format": json.loads(value)}
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


def _function(schema: Body, **more: Any) -> Body:
    return {"name": "f", "parameters": schema, **more}


def _outputs(kind: str, value: Any) -> Body:
    return {"structured_outputs": {kind: value}}


_ALL = ("regex", "grammar", "choice", "json", "structural_tag")
_SCHEMA = ("json",)
PLACES = [
    Place("chat, structured_outputs", CHAT, _ALL, lambda kind, value: _chat(**_outputs(kind, value))),
    Place(
        "chat, response_format",
        CHAT,
        ("json", "structural_tag"),
        lambda kind, value: _chat(**_response_format(kind, value)),
    ),
    Place(
        "chat, strict tool",
        CHAT,
        _SCHEMA,
        lambda _, value: _chat(tools=[{"type": "function", "function": _function(value, strict=True)}]),
    ),
    Place(
        "chat, required tool",
        CHAT,
        _SCHEMA,
        lambda _, value: _chat(
            tools=[{"type": "function", "function": _function(value, strict=True)}], tool_choice="required"
        ),
    ),
    Place(
        "chat, strict tool beside a constraint",
        CHAT,
        _ALL[:-1],
        lambda kind, value: _chat(
            tools=[{"type": "function", "function": _function(_object(a={"type": "integer"}), strict=True)}],
            **_outputs(kind, value),
        ),
    ),
    Place(
        "completions, structured_outputs", COMPLETIONS, _ALL, lambda kind, value: _completion(**_outputs(kind, value))
    ),
    Place(
        "completions, response_format",
        COMPLETIONS,
        ("json", "structural_tag"),
        lambda kind, value: _completion(**_response_format(kind, value)),
    ),
    Place("responses, structured_outputs", RESPONSES, _ALL, lambda kind, value: _response(**_outputs(kind, value))),
    Place(
        "responses, text.format",
        RESPONSES,
        _SCHEMA,
        lambda _, value: _response(text={"format": {"type": "json_schema", "name": "x", "schema": value}}),
    ),
    Place(
        "responses, strict tool",
        RESPONSES,
        _SCHEMA,
        lambda _, value: _response(tools=[{"type": "function", **_function(value, strict=True)}]),
    ),
    Place(
        "messages, output_config",
        MESSAGES,
        _SCHEMA,
        lambda _, value: _chat(output_config={"format": {"type": "json_schema", "schema": value}}),
    ),
    Place(
        "messages, forced tool",
        MESSAGES,
        _SCHEMA,
        lambda _, value: _chat(
            tools=[{"name": "f", "input_schema": value, "strict": True}], tool_choice={"type": "tool", "name": "f"}
        ),
    ),
]


def bombs() -> Iterator[tuple[str, str, Any]]:
    """Yield kind, name and constraint of each."""
    for kind, named in BOMBS.items():
        for name, value in named.items():
            yield kind, name, value
