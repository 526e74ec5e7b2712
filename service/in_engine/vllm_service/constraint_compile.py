"""What is done with a constraint in a bounded process: vLLM's own validation, then the engine's own compilation.

Then it follows the grammar for a few hundred tokens, as an engine does between two tokens of everybody: some grammars
compile at once and need seconds for a token, since there are many ways to read what was written so far.
"""

from __future__ import annotations

import functools
import json
import time
from types import SimpleNamespace
from typing import Any

from vllm_service.schema_faults import fault_of

MASK_S = 0.1  # of processor time for one token, in which the engine core serves no other request
FOLLOW_S = 0.6  # for all of them
_STEPS = 400  # tokens that are written
_CHOICES = 96  # of them not the only one possible
_RUN = 12  # of them letters, before a value's end is looked for
_LETTERS = "etaoinshrdlu ETAOIN0123456789"
_ENDS = '"}],:{[<>()/-.\n'
_BYTE_LEVEL = {" ": "Ġ", "\n": "Ċ"}  # as byte-level tokenizers spell them
_MORE = 64  # of other tokens, those that are tried


class ConstraintCompiler:
    """The work of a bounded process. Jobs are steps of `constraint_check`, which says what they are for.

    Args:
        vllm_config: The engine's.
        tokenizer: The engine's.
    """

    def __init__(self, vllm_config: Any, tokenizer: Any) -> None:
        self._config, self._tokenizer = vllm_config, tokenizer

    def prepare(self, job: dict[str, Any]) -> None:
        """Build the backend that a job compiles with; a fork would do it again for each job."""
        _use_one_thread()
        if job["step"] == "compile" and job["backend"] not in self._built:
            self._init_grammar({"regex": "a"}, job["backend"])
            self._built.add(job["backend"])
            self._written  # noqa: B018 - it is kept

    def do(self, job: dict[str, Any]) -> dict[str, Any]:
        """Return what came of a job: a `fault`, or what its step finds out."""
        try:
            return {"validate": self._validate, "compile": self._compile, "explain": self._explain}[job["step"]](job)
        except MemoryError:
            return {"exceeded": "memory"}
        except Exception as error:  # noqa: BLE001 - libraries raise whatever they like
            return {"exceeded": "memory"} if "bad_alloc" in str(error) else {"fault": str(error)}

    def _validate(self, job: dict[str, Any]) -> dict[str, Any]:
        """Return the backend that vLLM chooses, or takes, and the grammar that it makes of choices."""
        outputs = self._validated(job["constraint"], job["backend"])
        chosen = {"backend": outputs._backend, "was_auto": outputs._backend_was_auto}
        return {**chosen, "grammar": outputs.grammar}

    def _validated(self, constraint: dict[str, Any], backend: str | None) -> Any:
        params = _sampling_params(constraint)
        config = self._config.structured_outputs_config if backend is None else SimpleNamespace(backend=backend)
        params._validate_structured_outputs(self._config.model_config, config, self._tokenizer)
        return params.structured_outputs

    def _compile(self, job: dict[str, Any]) -> dict[str, Any]:
        grammar = self._init_grammar(job["constraint"], job["backend"])
        if isinstance(grammar, Exception):
            raise grammar
        return self._follow(grammar)

    def _explain(self, job: dict[str, Any]) -> dict[str, Any]:
        """Return in which schema, by its name in `job`, and where in it the fault is: `name`, `place`, `fault`."""
        import xgrammar

        def validate(schema: Any) -> None:
            self._validated({"json": json.dumps(schema)}, job["backend"])

        tag = job["constraint"].get("structural_tag")
        for name, schema in job["schemas"]:
            if found := fault_of(schema, xgrammar.Grammar.from_json_schema if tag else validate):
                return {"name": name, "place": found.place, "fault": found.reason}
        return {"fault": self._fault_of_tag(job["constraint"])} if tag else {}

    def _fault_of_tag(self, constraint: dict[str, Any]) -> str:
        """Return xgrammar's reason: vLLM's own error is of the backend that it tried last."""
        from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

        try:
            validate_xgrammar_grammar(_sampling_params(constraint))
        except Exception as error:  # noqa: BLE001 - libraries raise whatever they like
            return str(error.__cause__ or error)
        return ""

    @functools.cached_property
    def _built(self) -> set[str]:
        return set()

    @functools.cached_property
    def _manager(self) -> Any:
        from vllm.v1.structured_output import StructuredOutputManager

        manager = StructuredOutputManager(self._config)
        manager._use_async_grammar_compilation = False
        return manager

    def _init_grammar(self, constraint: dict[str, Any], backend: str) -> Any:
        from vllm.v1.structured_output.request import StructuredOutputRequest

        params = _sampling_params(constraint)
        params.structured_outputs._backend = backend
        asked = StructuredOutputRequest.from_sampling_params(params)
        request = SimpleNamespace(request_id="check", sampling_params=params, structured_output_request=asked)
        self._manager.grammar_init(request)
        return asked.grammar if asked else None

    @functools.cached_property
    def _written(self) -> list[tuple[int, ...]]:
        """The tokens that are written where they are allowed: letters first, or what may end a value first."""
        ids = self._tokenizer.get_vocab()
        found = [[ids.get(_BYTE_LEVEL.get(sign, sign), ids.get(sign)) for sign in signs] for signs in (_LETTERS, _ENDS)]
        letters, ends = ([token for token in tokens if token is not None] for tokens in found)
        return [(*letters, *ends), (*ends, *letters)]

    def _follow(self, grammar: Any) -> dict[str, Any]:
        """Write a little as the grammar allows, and judge what the tokens took."""
        mask = self._manager.backend.allocate_token_bitmask(1)
        taken_s: list[float] = []
        choices = 0
        while len(taken_s) < _STEPS and choices < _CHOICES and _is_quick(taken_s):
            begun = time.process_time()
            grammar.fill_bitmask(mask, 0)
            filled_s = time.process_time() - begun
            allowed = self._allowed(mask[0], choices)
            if not allowed:  # not even its end: the engine would fail at this token
                return {"fault": "No text matches it, or none that begins as some may begin"}
            begun = time.process_time()
            goes_on = grammar.accept_tokens("check", [allowed[choices % min(3, len(allowed))]])
            taken_s.append(filled_s + time.process_time() - begun)
            if error := _error_of(grammar):
                return {"fault": error}
            if not goes_on or grammar.is_terminated():
                break
            choices += len(allowed) > 1
        return {"is_served": True} if _is_quick(taken_s) else {"slow": [len(taken_s), sum(taken_s)]}

    def _allowed(self, mask: Any, choices: int) -> list[int]:
        words = mask.tolist()
        preferred = self._written[choices % (_RUN + 1) == _RUN]
        allowed = [token for token in preferred if words[token // 32] >> token % 32 & 1]
        if allowed:
            return allowed
        others = (32 * index + bit for index, word in enumerate(words) if word for bit in range(32) if word >> bit & 1)
        return [token for token, _ in zip(others, range(_MORE), strict=False)]


def _error_of(grammar: Any) -> str:
    """Return why guidance has given up; vLLM then ends the answer in the middle."""
    matcher = getattr(grammar, "ll_matcher", None)
    return str(matcher.get_error() or "") if matcher is not None else ""


def _is_quick(taken_s: list[float]) -> bool:
    """Judge the seconds of tokens; the one slowest may have been a hiccup."""
    return sum(taken_s) < FOLLOW_S and sum(second > MASK_S for second in taken_s) < 2


def _sampling_params(constraint: dict[str, Any]) -> Any:
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams

    return SamplingParams(structured_outputs=StructuredOutputsParams(**constraint))


@functools.cache
def _use_one_thread() -> None:
    """Compile in the thread that is limited: a fork has no other, and each would reserve address space of its own."""
    import vllm.envs
    import xgrammar

    compiler = xgrammar.GrammarCompiler
    xgrammar.GrammarCompiler = lambda *args, **kwargs: compiler(*args, **{**kwargs, "max_threads": 1})
    vllm.envs.VLLM_REGEX_COMPILATION_TIMEOUT_S = 0
