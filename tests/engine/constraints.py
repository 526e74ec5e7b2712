"""Structured outputs, those first that have taken engines down, and what becomes of each.

Each is named after what it comes from: issues of vLLM and xgrammar, and what one core of a laptop cannot compile.
"""

from __future__ import annotations

import json
from typing import Any

Outputs = dict[str, Any]


def schema(**more: Any) -> Outputs:
    """Return the structured output of an object with these properties, all required."""
    return {"json": {"type": "object", "properties": more, "required": [*more]}}


def chain(levels: int) -> Outputs:
    """Return a grammar of so many rules, each twice the one before."""
    rules = "".join(f"r{i} ::= r{i + 1} r{i + 1}\n" for i in range(levels))
    return {"grammar": f'root ::= r0\n{rules}r{levels} ::= "b"'}


SERVED: dict[str, Outputs] = {
    "object": schema(name={"type": "string"}, age={"type": "integer", "minimum": 0, "maximum": 20_000_000_000}),
    "formats": schema(a={"type": "string", "format": "email"}, b={"type": "string", "format": "date-time"}),
    "string of a length, vllm 863": schema(m={"type": "string", "pattern": r"^[^\n\r]{1,129}$"}),
    "long strings": schema(**{f"s{i}": {"type": "string", "maxLength": 1000} for i in range(10)}),
    "lists of lists": schema(a={"type": "array", "maxItems": 200, "items": {"type": "array", "maxItems": 50}}),
    "1000 properties": schema(**{f"p{i}": {"type": "string"} for i in range(1000)}),
    "300 optional properties": {"json": {"type": "object", "properties": {f"p{i}": {} for i in range(300)}}},
    "10000 values": {"json": {"enum": [f"value {i}" for i in range(10_000)]}},
    "recursion": {"json": {"$ref": "#/$defs/n", "$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}}}}},
    "63 levels": {"json": json.loads('{"type":"array","items":' * 63 + "{}" + "}" * 63)},
    "anything": {"json": {}},
    "as a string": {"json": '{"type":"string"}'},
    "address": {"regex": r"[\w.-]+@[\w.-]+\.\w{2,6}"},
    "empty alternative, vllm 37642": {"regex": "^(|.*)$"},
    "list of words": {"regex": "([a-z]{1,20},){1,100}"},
    "words": {"regex": "([a-z]+ ){1,50}[a-z]+"},
    "nested repetition": {"regex": "(a+)+b"},
    "exponential automaton": {"regex": "(a|b)*a(a|b){30}"},
    "large count": {"regex": "[abc]{100000}"},
    "1000 parentheses": {"regex": "(" * 1000 + "a" + ")" * 1000},
    "choice": {"choice": ['say "yes"', "no\n", "back\\slash", "\x00\x7f", "ümläut"]},
    "1000 choices": {"choice": [f"choice {i}" for i in range(1000)]},
    "grammar": {"grammar": 'root ::= "SELECT " c ("," c)*\nc ::= [a-z]+'},
    "left recursion": {"grammar": 'root ::= root "a" | "b"'},
    "no end": {"grammar": 'root ::= "a" root'},
    "2 to the 40 letters": chain(40),
    "lark": {"grammar": 'start: "a" | WORD\n%import common.WORD'},
    "structural tag": {"structural_tag": '{"type":"structural_tag","format":{"type":"json_schema","json_schema":{}}}'},
    "old structural tag": {
        "structural_tag": '{"structures":[{"begin":"<f>","schema":{},"end":"</f>"}],"triggers":["<f"]}'
    },
    # What xgrammar cannot compile, cannot compile in time or cannot follow in time, and guidance can.
    "vllm 43920": {"grammar": 'root ::= "a"\nroot ::= "b"'},
    "letters of any script": {"regex": r"\p{L}+"},
    "multipleOf": schema(a={"type": "integer", "multipleOf": 3}),
    "pattern and length": schema(a={"type": "string", "pattern": "^[a-z]+$", "minLength": 3, "maxLength": 8}),
    "no rule": {"grammar": "root ::= "},
    "optional separator": {"regex": "([a-z]{1,30} ?){1,30}"},
    "optional separator, far in": {"regex": "I say: ([a-z]{1,30} ?){1,30}"},
    "counts of counts in a schema": schema(a={"type": "string", "pattern": "^(([a-z]{1,99}){1,99}){1,99}$"}),
}
# No backend serves them, or none in time: outputs, and what the sentence says.
REFUSED: dict[str, tuple[Outputs, str]] = {
    "vllm 17313": ({"regex": "("}, "unclosed group"),
    "vllm 19270": ({"regex": "[a-z"}, "unclosed character class"),
    "vllm 17248": ({"json": {"type": "str"}}, "Invalid type: str (at #/type)"),
    "lookahead": ({"regex": "(?=a)b"}, "look-ahead"),
    "back reference": ({"regex": r"(a)\1"}, "backreferences"),
    "word boundary": ({"regex": r"\bfoo\b"}, "lookarounds"),
    "count of 23 digits": ({"regex": "a{99999999999999999999999}"}, "decimal literal invalid"),
    "bad pattern": (schema(a={"type": "string", "pattern": "("}), "(at #/properties/a/pattern)"),
    "missing reference": ({"json": {"$ref": "#/$defs/no"}}, "(at #/$ref)"),
    "nothing fits": (schema(a=False), "required property 'a' is unsatisfiable"),
    "uniqueItems": (schema(a={"type": "array", "uniqueItems": True}), "(at #/properties/a/uniqueItems)"),
    "integer of 41 digits": ({"json": {"type": "integer", "maximum": 10**40}}, "json.maximum"),
    "no root": ({"grammar": 'a ::= "a"'}, "No 'root' rule"),
    "undefined rule": ({"grammar": "root ::= b"}, "Rule 'b' not found"),
    "5000 parentheses": ({"grammar": f"root ::= {'(' * 5000}'a'{')' * 5000}"}, "recursion"),
    "bad lark": ({"grammar": "start: ("}, "Expected token ')'"),
    "tag without its trigger": (
        {"structural_tag": '{"structures":[{"begin":"<f>","schema":{},"end":"</f>"}],"triggers":["x"]}'},
        "trigger",
    ),
    "rule of itself alone": ({"grammar": "root ::= root"}, "No text matches it"),
    "reference to itself": ({"json": {"$ref": "#"}}, "No text matches it"),
    "counts of counts": ({"regex": "([a-z0-9_.]{1,1000}x?){1,1000}"}, "ambiguous"),
    "counts of counts in a grammar": ({"grammar": "root ::= (([a-z] [a-z]?){1,1000}){1,1000}"}, "ambiguous"),
    "every way to cut nothing": ({"grammar": 'root ::= root root | "" | "a"'}, "ambiguous"),
    "1500 levels in lark": ({"grammar": "start: %json " + '{"items":' * 1500 + "{}" + "}" * 1500}, "2 s of processor"),
    "150 properties, counted": (
        {"json": {"allOf": [{"type": "object", "properties": {f"p{i}_{j}": {} for i in range(95)}, "minProperties": 1}
                            for j in range(1)],
                  "anyOf": [{"type": "object", "properties": {f"q{i}_{j}": {} for i in range(99)}, "minProperties": 1}
                            for j in range(12)]}},
        "more than 2 s of processor time",
    ),
}  # fmt: skip
