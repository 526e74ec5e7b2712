"""Schemas as people write them, sent here and to vLLM's own server: what is served, and whether the answers fit.

They are those of `bench.schemas` as `response_format`, and the tools of three MCP servers: all of a server together,
each alone, each strict, and each strict and forced. An answer that is not cut must be valid by jsonschema; a 400 must
name keyword and place. Nothing may be refused here that vLLM's own server serves.

Run by `make bench-schemas`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from bench.constraint_bombs import guarded_engine, plain_server
from bench.report import Report
from bench.schemas import mcp, suite
from bench.schemas.models import MODELS
from service.engine import environment
from tests.clients import client_env

CONTEXT = 32_768  # the tools of a server are 10,000 tokens of the tiny model
LONG = ("--hf-overrides", json.dumps({"max_position_embeddings": CONTEXT}), "--max-model-len", str(CONTEXT))
_SAY = [{"role": "user", "content": "Write down what comes to your mind, please."}]
_ENDS = {'"': 40, "}": 20, "]": 20, "<|im_end|>": 60}  # made likelier: a tiny model would fill a string without end
_SHOWN = 50  # of so many requests one is shown
_NAMED = re.compile(r"\(at #[^)]*\)|param|tools\[|does not exist")
_VALIDATE = """
import json, re, sys
from jsonschema import Draft202012Validator, FormatChecker
FormatChecker.checkers.pop("time", None)  # it takes no time zone, which a time has by RFC 3339
for line in sys.stdin:
    schema, text = json.loads(line)
    try:
        Draft202012Validator(schema, format_checker=FormatChecker()).validate(json.loads(text))
        print("valid")
    except re.error:
        print("valid")  # Python's expressions lack \\p{L}
    except Exception as error:
        print(type(error).__name__, " ".join(str(error).split())[:200])
"""


@dataclass(frozen=True)
class Case:
    """One request.

    Attributes:
        kind: What it is of.
        name: Which one.
        fields: Of the body.
        schemas: The schema of the answer, or those of the tools by name.
    """

    kind: str
    name: str
    fields: dict[str, Any]
    schemas: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What came of a request: `valid`, `invalid: …`, `cut`, `no call`, or an error; without an answer, status 0."""

    status: int
    text: str


def cases(node_modules: Path) -> Iterator[Case]:
    """Yield all requests."""
    for name, schema in suite().items():
        yield _schema_case("JSON Schema test suite", name, schema)
        yield _schema_case("JSON Schema test suite, strict", name, schema, strict=True)
    for name, model in MODELS.items():
        yield _schema_case("pydantic", name, model.model_json_schema())
        yield _schema_case("pydantic, strict", name, model.model_json_schema(), strict=True)
    for server in mcp.SERVERS:
        tools = mcp.tools(node_modules, server)
        yield _tools_case(f"MCP, {server}: all tools", "all", tools)
        for tool in tools:
            yield _tools_case(f"MCP, {server}: a tool", tool["name"], [tool])
            yield _tools_case(f"MCP, {server}: a strict tool", tool["name"], [tool], strict=True)
            yield _tools_case(f"MCP, {server}: a forced tool", tool["name"], [tool], "required", strict=True)


def _schema_case(kind: str, name: str, schema: Any, **more: Any) -> Case:
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}
    return Case(kind, name, {"response_format": format_}, {"": schema})


def _tools_case(kind: str, name: str, tools: list[dict[str, Any]], choice: str = "auto", **more: Any) -> Case:
    functions = [{"name": tool["name"], "parameters": tool["inputSchema"], **more} for tool in tools]
    tools_field = [{"type": "function", "function": function} for function in functions]
    fields: dict[str, Any] = {"tools": tools_field, "tool_choice": choice}
    if choice == "required":
        fields["parallel_tool_calls"] = False  # a tiny model would call without end
    return Case(kind, name, fields, {tool["name"]: tool["inputSchema"] for tool in tools})


class Asker:
    """Sends cases to one server.

    Args:
        url: Where it listens.
        python: An interpreter with jsonschema: the engine's.
    """

    def __init__(self, url: str, python: str) -> None:
        self._url, self._python = url, python
        self._to_validate: list[tuple[int, Any, str]] = []
        ends = [{"prompt": end, "add_special_tokens": False} for end in _ENDS]
        tokens = [self._post("/tokenize", end).json()["tokens"] for end in ends]
        biases = zip(tokens, _ENDS.values(), strict=True)
        self._bias = {str(found[0]): bias for found, bias in biases if len(found) == 1}

    def outcomes(self, cases: list[Case]) -> list[Outcome]:
        """Return what came of each case."""
        found = []
        for number, case in enumerate(cases):
            found.append(self._ask(number, case))
            if not number % _SHOWN:
                print(f"{self._url}: {number} of {len(cases)} requests, {case.kind}", file=sys.stderr, flush=True)
        lines = "".join(json.dumps([schema, text]) + "\n" for _, schema, text in self._to_validate)
        command = [self._python, "-c", _VALIDATE]
        verdicts = subprocess.run(command, input=lines, capture_output=True, text=True, check=True).stdout.splitlines()
        for (number, _, text), verdict in zip(self._to_validate, verdicts, strict=True):
            found[number] = Outcome(200, verdict if verdict == "valid" else f"invalid: {verdict} in {text[:80]}")
        return found

    def _ask(self, number: int, case: Case) -> Outcome:
        body = {"messages": _SAY, "max_tokens": 200, "temperature": 0, "logit_bias": self._bias, **case.fields}
        body["chat_template_kwargs"] = {"enable_thinking": False}  # constraints hold behind a thought
        try:
            answer = self._post("/v1/chat/completions", body)
        except requests.RequestException as failure:
            return Outcome(0, type(failure).__name__)
        if not answer.ok:
            error = answer.json().get("error", {})
            return Outcome(answer.status_code, f"{error.get('message')} param={error.get('param')}")
        choice = answer.json()["choices"][0]
        calls = choice["message"].get("tool_calls") or []
        if choice["finish_reason"] == "length":
            return Outcome(200, "cut")
        if "tools" not in case.fields:
            self._to_validate.append((number, case.schemas[""], choice["message"]["content"] or ""))
        elif not calls:
            return Outcome(200, "no call" if case.fields["tool_choice"] == "auto" else "invalid: no call")
        elif all(tool["function"].get("strict") for tool in case.fields["tools"]):
            function = calls[0]["function"]
            self._to_validate.append((number, case.schemas[function["name"]], function["arguments"]))
        return Outcome(200, "called")

    def _post(self, path: str, body: dict[str, Any]) -> requests.Response:
        return requests.post(f"{self._url}{path}", json={"model": "llm", **body}, timeout=120)


def main() -> int:
    """Ask both servers, print what differs, and save the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose kind has this in it")
    arguments = parser.parse_args()
    chosen = [case for case in cases(client_env.mcp_servers()) if arguments.only.lower() in case.kind.lower()]
    env = environment.ensure()
    with guarded_engine(env, LONG) as server:
        ours = Asker(server.url, env.python).outcomes(chosen)
    with plain_server(env.python, LONG) as server:
        plain = Asker(server.url, env.python).outcomes(chosen)
    report = Report("schemas")
    for kind in dict.fromkeys(case.kind for case in chosen):
        rows = [row for row in zip(chosen, ours, plain, strict=True) if row[0].kind == kind]
        _add(report, kind, rows)
    return report.finish(keep=not arguments.only)


def _add(report: Report, kind: str, rows: list[tuple[Case, Outcome, Outcome]]) -> None:
    for case, ours, plain in rows:
        if ours.status != 200 or ours.text.startswith("invalid") or plain.status != ours.status:
            print(f"{kind}: {case.name}\n    here  {ours.status} {ours.text}\n    plain {plain.status} {plain.text}")
    report.add(f"{kind}: requests", len(rows))
    for outcome, count in sorted(Counter(_class(ours) for _, ours, _ in rows).items()):
        is_bad = outcome in {"0", "500", "502", "unnamed refusal"} or (outcome == "invalid" and kind.endswith("strict"))
        report.add(f"{kind}: {outcome}", count, 0 if is_bad else None)
    refused = sum(ours.status != 200 and plain.status == 200 for _, ours, plain in rows)
    report.add(f"{kind}: refused, and served by vLLM's own server", refused, None if kind.endswith("strict") else 0)
    report.add(f"{kind}: invalid by vLLM's own server", sum(plain.text.startswith("invalid") for *_, plain in rows))
    report.add(f"{kind}: not served by vLLM's own server", sum(plain.status != 200 for *_, plain in rows))


def _class(outcome: Outcome) -> str:
    if outcome.status == 200:
        return outcome.text.partition(":")[0]
    if outcome.status == 400:
        return "refused" if _NAMED.search(outcome.text) else "unnamed refusal"
    return str(outcome.status)


if __name__ == "__main__":
    sys.exit(main())
