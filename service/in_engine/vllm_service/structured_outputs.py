"""Three changes to vLLM's structured outputs.

With its default `auto`, vLLM chooses a backend for each request: xgrammar, or guidance or outlines where xgrammar lacks
a keyword. But an engine of vLLM 0.32 builds only the backend of its first structured request and compiles every later
request with it (vllm-project/vllm#43920). Behind a first request for xgrammar, `minLength` beside `pattern` is ignored
in silence; behind a first request for guidance, every forced tool call fails. Here each request gets the backend that
was chosen for it.

With `auto`, JSON may hold white space without end. SmolLM2-135M-Instruct wrote nothing but white space up to its
`max_tokens` of 300 in 38 of 150 answers (five schemas, ten prompts, temperatures 0, 0.7 and 1.0): 104 were whole and
valid, and 146 with `disable_any_whitespace`. vLLM refuses that switch together with `auto`, although both backends that
read it obey it.

Grammars are compiled in `GrammarExecutor`, where clients take turns.
"""

from __future__ import annotations

import copy
from typing import Any

from vllm_service.grammar_executor import WORKERS, GrammarExecutor


def enable() -> None:
    """Change vLLM in this process; call it before an engine is built."""
    _compile_with_the_chosen_backend()


def has_a_backend_for_each(vllm_config: Any, tokenizer: Any) -> bool:
    """Tell whether requests can have different backends: guidance's bitmasks may be wider than the others'."""
    vocab_size = vllm_config.model_config.get_vocab_size()
    return bool(len(tokenizer) <= vocab_size + -vocab_size % 32)


def _compile_with_the_chosen_backend() -> None:
    from vllm.v1.structured_output import StructuredOutputManager

    init = StructuredOutputManager.grammar_init

    def grammar_init(self: Any, request: Any) -> None:
        if request.structured_output_request is None:
            return
        if not isinstance(self.executor, GrammarExecutor):
            self.executor = GrammarExecutor(min(self.executor._max_workers, WORKERS))  # vLLM's has begun no thread yet
        if not has_a_backend_for_each(self.vllm_config, self.tokenizer):
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
