"""Where the constraints of requests are checked in vLLM: while it renders a request, and once more before the engine.

Rendering comes before a stream's first byte, so that a stream is refused by status. There are two constraints to check:
what the client wrote, and what vLLM makes of it and of strict or forced tools. The engine's `add_request` is what all
requests pass, and takes over the verdict: neither there nor earlier does vLLM compile anything on the event loop.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
from typing import Any

from vllm_service import structured_outputs
from vllm_service.bounded_process import BoundedProcess
from vllm_service.client_turns import client
from vllm_service.constraint_check import BOUNDS, ConstraintCheck, Source
from vllm_service.constraint_compile import ConstraintCompiler
from vllm_service.grammar_executor import CLIENT

RENDERERS = ("render_chat", "render_completion", "render_responses")
_CHECKED = "_vllm_service_checked"  # in `__dict__` of SamplingParams, which is not sent to the engine core
# Whether xgrammar takes what the client of this request wrote; False: vLLM then leaves tool calls unconstrained.
_xgrammar_takes: contextvars.ContextVar[bool] = contextvars.ContextVar("_xgrammar_takes", default=False)


def enable(engine: Any) -> None:
    """Check the constraints of every request to this engine; nothing is started before the first one.

    Args:
        engine: vLLM's `AsyncLLM`; one without a tokenizer takes no constraints.
    """
    config, tokenizer = engine.vllm_config, engine.input_processor.tokenizer
    if tokenizer is None:
        return
    has_choice = config.structured_outputs_config.backend == "auto"
    is_auto = has_choice and structured_outputs.has_a_backend_for_each(config, tokenizer)
    process = BoundedProcess(ConstraintCompiler(config, tokenizer), BOUNDS)
    check = ConstraintCheck(process, is_auto=is_auto)
    _check_before_the_engine(engine, check)
    _check_while_rendering(check)
    _validate_nothing_twice()


def _check_before_the_engine(engine: Any, check: ConstraintCheck) -> None:
    add_request = engine.add_request

    async def checked_add_request(request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = getattr(params, "structured_outputs", None)
        if outputs is not None and not outputs.all_constraints_none() and _CHECKED not in params.__dict__:
            params.structured_outputs = await _checked(check, outputs)
            params.__dict__[_CHECKED] = True
            params.extra_args = {**(params.extra_args or {}), CLIENT: client.get()}
        return await add_request(request_id, prompt, params, *args, **kwargs)

    engine.add_request = checked_add_request


async def _checked(check: ConstraintCheck, outputs: Any) -> Any:
    """Return a constraint as vLLM's validation leaves it."""
    verdict = await check.check(outputs, Source("structured_outputs"))
    changes = {"choice": None, "grammar": verdict.grammar} if verdict.grammar else {}
    outputs = dataclasses.replace(outputs, **changes)
    outputs._backend, outputs._backend_was_auto = verdict.backend, verdict.was_auto
    return outputs


def _check_while_rendering(check: ConstraintCheck) -> None:
    from vllm.renderers.online_renderer import OnlineRenderer

    for name in RENDERERS:
        setattr(OnlineRenderer, name, _checking(getattr(OnlineRenderer, name), check))


def _checking(render: Any, check: ConstraintCheck) -> Any:
    @functools.wraps(render)
    async def checked_render(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        written = _outputs_of(request)
        if written is not None:
            await check.check(written, _source_of(request))
            if getattr(request, "tools", None):
                _xgrammar_takes.set(await check.xgrammar_takes(written))
        rendered = await render(self, request, *args, **kwargs)
        made = _outputs_of(request) if getattr(request, "tools", None) else None
        if made is not None and made != written:
            await check.check(made, Source("tools", _schemas_of(request.tools, is_strict=made.json is None)))
        return rendered

    return checked_render


def _outputs_of(request: Any) -> Any:
    extract = getattr(request, "extract_structured_outputs", None)
    outputs = extract() if extract else None
    return None if outputs is None or outputs.all_constraints_none() else outputs


def _source_of(request: Any) -> Source:
    """Return the field in which the client of a request wrote its constraint, and whether it is strict there."""
    if form := getattr(request, "response_format", None):
        return Source("response_format", is_strict=_is_strict(getattr(form, "json_schema", None)))
    if text := getattr(request, "text", None):
        return Source("text", is_strict=_is_strict(text.format))
    return Source("structured_outputs")


def _is_strict(form: Any) -> bool:
    return getattr(form, "strict", None) is True


def _schemas_of(tools: list[Any], *, is_strict: bool) -> list[tuple[str, Any]]:
    """Return names and schemas of the tools, of strict ones only or of all."""
    functions = [getattr(tool, "function", tool) for tool in tools]
    return [
        (function.name, parameters)
        for function in functions
        if (parameters := getattr(function, "parameters", None)) and (function.strict or not is_strict)
    ]


def _validate_nothing_twice() -> None:
    """Take the compilation out of vLLM's own checks, which run on the event loop."""
    from vllm.entrypoints.generate.base import protocol
    from vllm.parser import abstract_parser
    from vllm.sampling_params import SamplingParams, check_json_nesting

    validate = SamplingParams._validate_structured_outputs

    def validate_structured_outputs(self: Any, *args: Any) -> None:
        if _CHECKED not in self.__dict__:
            validate(self, *args)

    def validate_structural_tag_payload(payload: Any, *, parameter: str) -> None:
        from vllm.exceptions import VLLMValidationError

        if not isinstance(payload, str) or not payload:
            raise VLLMValidationError(f"Invalid {parameter} structural_tag specification.", parameter=parameter)
        check_json_nesting(payload, structural_tag=True)

    SamplingParams._validate_structured_outputs = validate_structured_outputs  # type: ignore[method-assign]
    protocol.validate_structural_tag_payload = validate_structural_tag_payload
    abstract_parser._xgrammar_supports = lambda _: _xgrammar_takes.get()
