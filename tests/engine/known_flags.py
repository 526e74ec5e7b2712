"""Run with the ENGINE's python: parse command lines with the pinned engine's own parser, and tell what it knows.

Reads `{"commands": {name: argv}}` as JSON from stdin. Prints one line of JSON: for every command the options as
they were parsed or the parser's complaint, and the names that the engine's registries have.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import sys
from typing import Any, get_args


def main() -> None:
    """Answer on stdout; whatever vLLM prints goes to stderr."""
    asked = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        parser = _parser()
        answer = {"parsed": _parse_all(parser, asked["commands"]), "flags": _flags(parser), **_known()}
    print(json.dumps(answer))  # noqa: T201 - this is a program


def _parser() -> argparse.ArgumentParser:
    cli_args = importlib.import_module("vllm.entrypoints.launchers.cli_args")
    argparse_utils = importlib.import_module("vllm.utils.argparse_utils")
    parser: argparse.ArgumentParser = cli_args.make_arg_parser(
        argparse_utils.FlexibleArgumentParser(prog="vllm serve", allow_abbrev=False)
    )
    return parser


def _parse_all(parser: argparse.ArgumentParser, commands: dict[str, list[str]]) -> dict[str, Any]:
    validate = importlib.import_module("vllm.entrypoints.launchers.cli_args").validate_parsed_serve_args
    return {name: _parse(parser, validate, argv) for name, argv in commands.items()}


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    return [flag for action in parser._actions for flag in action.option_strings]


def _parse(parser: argparse.ArgumentParser, validate: Any, argv: list[str]) -> dict[str, Any]:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = parser.parse_args(argv)
            validate(args)
    except SystemExit:
        return {"error": said.getvalue().rpartition("[model_tag]")[2].strip()}  # less the usage
    except Exception as error:  # noqa: BLE001 - whatever the parser raises is its complaint
        return {"error": f"{type(error).__name__}: {error}"}
    return {"options": {name: _plain(value) for name, value in vars(args).items()}}


def _plain(value: Any) -> Any:
    """Turn a parsed value into JSON; of a configuration only its fields."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name, None)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _known() -> dict[str, list[str]]:
    config = importlib.import_module("vllm.config")
    kernel = importlib.import_module("vllm.config.kernel")
    cache = importlib.import_module("vllm.config.cache")
    speculative = importlib.import_module("vllm.config.speculative")
    structured = importlib.import_module("vllm.config.structured_outputs")
    return {
        "tool_call_parsers": _registered("vllm.tool_parsers", "ToolParserManager"),
        "reasoning_parsers": _registered("vllm.reasoning", "ReasoningParserManager"),
        "moe_backends": _literals(kernel.MoEBackend),
        "kv_cache_dtypes": _literals(cache.CacheDType),
        "speculative_methods": _literals(speculative.SpeculativeMethod),
        "speculative_fields": _fields(config.SpeculativeConfig),
        "fusion_passes": _fields(config.PassConfig),
        "structured_outputs_fields": _fields(config.StructuredOutputsConfig),
        "structured_outputs_backends": _literals(structured.StructuredOutputsBackend),
        "variables": list(importlib.import_module("vllm.envs").environment_variables),
    }


def _registered(module: str, manager: str) -> list[str]:
    return sorted(getattr(importlib.import_module(module), manager).list_registered())


def _literals(annotation: Any) -> list[str]:
    """Return every string of a Literal, or of a union of them."""
    parts = get_args(annotation)
    return [text for part in parts for text in ([part] if isinstance(part, str) else _literals(part))]


def _fields(config: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(config)]


if __name__ == "__main__":
    main()
