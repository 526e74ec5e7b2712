"""Two changes to vLLM's structured outputs, and the place of a fault in its errors.

With its default `auto`, vLLM chooses a backend for each request: xgrammar, or guidance or outlines where xgrammar lacks
a keyword. But an engine of vLLM 0.32 builds only the backend of its first structured request and compiles every later
request with it (vllm-project/vllm#43920). Behind a first request for xgrammar, `minLength` beside `pattern` is ignored
in silence; behind a first request for guidance, every forced tool call fails. Here each request gets the backend that
was chosen for it.

With `auto`, JSON may hold white space without end. SmolLM2-135M-Instruct wrote nothing but white space up to its
`max_tokens` of 300 in 38 of 150 answers (five schemas, ten prompts, temperatures 0, 0.7 and 1.0): 104 were whole and
valid, and 146 with `disable_any_whitespace`. vLLM refuses that switch together with `auto`, although both backends that
read it obey it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

_NAMED = ("format", "pattern", "type", "$ref")  # keywords whose value is what an error names
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # their keys are no keywords


def enable() -> None:
    """Change vLLM in this process; call it before an engine is built."""
    _compile_with_the_chosen_backend()
    _name_the_place()


def _compile_with_the_chosen_backend() -> None:
    from vllm.v1.structured_output import StructuredOutputManager

    init = StructuredOutputManager.grammar_init

    def grammar_init(self: Any, request: Any) -> None:
        if request.structured_output_request is None:
            return
        vocab_size = self.vllm_config.model_config.get_vocab_size()
        if len(self.tokenizer) > vocab_size + -vocab_size % 32:  # guidance's bitmasks are wider than the others' then
            init(self, request)
            return
        managers = self.__dict__.setdefault("managers", {})  # one a backend: a copy that shares all but the backend
        chosen = request.sampling_params.structured_outputs._backend
        if chosen not in managers:
            config = self.vllm_config.structured_outputs_config
            if config.backend == "auto":  # with another backend vLLM takes the switch itself
                config.disable_any_whitespace = True
            managers[chosen] = copy.copy(self)
            managers[chosen].backend = None
        init(managers[chosen], request)
        self.backend = self.backend or managers[chosen].backend  # it allocates the bitmask of all

    StructuredOutputManager.grammar_init = grammar_init  # type: ignore[method-assign]


def _name_the_place() -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    validate = SamplingParams._validate_structured_outputs

    def validate_structured_outputs(self: Any, *arguments: Any) -> None:
        try:
            validate(self, *arguments)
        except VLLMValidationError as error:
            if place := self.structured_outputs.json is not None and place_of(str(error), self.structured_outputs.json):
                raise VLLMValidationError(f"{error} (at {place})") from error
            raise

    SamplingParams._validate_structured_outputs = validate_structured_outputs  # type: ignore[method-assign]


def place_of(error: str, schema: object) -> str:
    """Return the JSON pointer of the first keyword in a schema that an error names by key or by value, or ""."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            return ""
    for pointer, keyword, value in _keywords(schema):
        named = json.dumps(keyword) in error or (keyword in _NAMED and isinstance(value, str) and value in error)
        if named:
            return pointer
    return ""


def _keywords(schema: object) -> Iterator[tuple[str, str, object]]:
    """Yield pointer, keyword and value of all keywords, without recursion: a schema may be nested without bound."""
    todo: list[tuple[str, object, bool]] = [("#", schema, False)]
    while todo:
        pointer, node, holds_names = todo.pop()
        if isinstance(node, list):
            todo += [(f"{pointer}/{index}", child, False) for index, child in enumerate(node)]
        elif isinstance(node, dict):
            children = [(f"{pointer}/{key.replace('~', '~0').replace('/', '~1')}", key, node[key]) for key in node]
            if not holds_names:
                yield from children
            todo += [(place, child, not holds_names and key in _BY_NAME) for place, key, child in reversed(children)]
