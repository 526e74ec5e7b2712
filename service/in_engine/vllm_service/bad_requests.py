"""Five changes to vLLM, so that a request's wrong values end with 400 and the field's name, and not with 500.

vLLM 0.32 answers 500 where an integer does not fit into 64 bits (`top_k`, `thinking_token_budget`, `stream_interval`,
an `enum` of a schema) and where a validator of its request models meets a type that it does not expect
(`"structured_outputs": []`). It tells a prompt that fills the context exactly that "max_tokens must be at least 1", and
a stream of `/v1/messages` about any error that its own error was no chunk of a chat. For 400 of `/v1/messages` and of
streams it logs a traceback of 6 KB, with the client's value in it.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Literal

from . import engine_errors

_LEAST, _MOST = -(2**63), 2**64 - 1  # of an integer in the messages to the engine core
_UNEXPECTED = (AttributeError, TypeError, KeyError, IndexError, OverflowError, RecursionError)
_KEPT, _DEPTH = 100, 4
_LOGGED = 300  # characters of what the log says of a client's error


def enable() -> None:
    """Change vLLM in this process; call it before requests are served."""
    _refuse_what_the_core_cannot_be_sent()
    _refuse_what_validators_do_not_expect()
    _refuse_prompts_without_room()
    _pass_on_errors_in_streams_of_messages()


def shorten_log() -> None:
    """Leave tracebacks of clients' errors and queries out of the log; call it once vLLM has configured logging."""
    for handler in logging.getLogger("vllm").handlers:
        handler.addFilter(shorten_clients_error)
    logging.getLogger("uvicorn.access").addFilter(drop_query)


def drop_query(record: logging.LogRecord) -> bool:
    """Leave the query out of a line of uvicorn's: a client may have put its key there."""
    if isinstance(record.args, tuple):
        record.args = tuple(part.partition("?")[0] if isinstance(part, str) else part for part in record.args)
    return True


def shorten_clients_error(record: logging.LogRecord) -> bool:
    """Leave the traceback of a client's error out of the log, and most of its text, which the client chose."""
    error = record.exc_info[1] if record.exc_info else None
    if error and engine_errors.is_clients(error):
        record.msg, record.args = record.getMessage()[:_LOGGED], ()
        record.exc_info = record.exc_text = None
    return True


def _refuse_what_the_core_cannot_be_sent() -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.async_llm import AsyncLLM

    add_request = AsyncLLM.add_request

    async def add_request_or_refuse(self: Any, request_id: str, prompt: Any, params: Any, **kwargs: Any) -> Any:
        try:
            return await add_request(self, request_id, prompt, params, **kwargs)
        except (ValueError, TypeError, OverflowError) as error:
            await self.abort(request_id)  # vLLM has noted the request before it sent it
            path = next(_outside_64_bits(_fields_of(params) | (kwargs.get("reasoning_parser_kwargs") or {})), None)
            fault = f"{path} is an integer that does not fit into 64 bits." if path else str(error)
            raise VLLMValidationError(fault, parameter=path and path.partition(".")[0].partition("[")[0]) from error

    AsyncLLM.add_request = add_request_or_refuse  # type: ignore[method-assign]


def _refuse_what_validators_do_not_expect() -> None:
    from fastapi._compat import ModelField

    validate = ModelField.validate

    def validate_or_refuse(self: Any, value: Any, values: Any = None, *, loc: Any = ()) -> Any:
        try:
            return validate(self, value, values or {}, loc=loc)
        except _UNEXPECTED as error:
            field = _field_at_fault(lambda body: validate(self, body, {}, loc=loc), value)
            fault = f"Input should be of another type: {error}"
            return None, [{"type": "value_error", "loc": (*loc, field) if field else loc, "msg": fault}]

    ModelField.validate = validate_or_refuse  # type: ignore[method-assign]


def _refuse_prompts_without_room() -> None:
    from vllm.entrypoints.serve.utils import api_utils
    from vllm.exceptions import VLLMValidationError

    get_max_tokens = api_utils.get_max_tokens

    def get_max_tokens_or_refuse(max_model_len: int, max_tokens: Any, input_length: int, *args: Any, **kw: Any) -> int:
        found = get_max_tokens(max_model_len, max_tokens, input_length, *args, **kw)
        if found < 1 and input_length >= max_model_len:
            raise VLLMValidationError(
                f"This model's maximum context length is {max_model_len} tokens. However, your prompt contains "
                f"{input_length} input tokens, which leaves no room for an answer. Please reduce the length of the "
                "input prompt.",
                parameter="input_tokens",
            )
        return found

    for module in [*sys.modules.values()]:  # those that imported it by name
        if vars(module).get("get_max_tokens") is get_max_tokens:
            module.get_max_tokens = get_max_tokens_or_refuse  # type: ignore[attr-defined]


def _pass_on_errors_in_streams_of_messages() -> None:
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

    convert = AnthropicServingMessages.message_stream_converter

    async def convert_and_pass_on(self: Any, chunks: Any, *args: Any, **kwargs: Any) -> AsyncIterator[str]:
        error = ""

        async def until_error() -> AsyncIterator[str]:
            nonlocal error
            async for chunk in chunks:
                if chunk.startswith('data: {"error"'):
                    error = chunk
                    return
                yield chunk

        async for event in convert(self, until_error(), *args, **kwargs):
            yield event
        if error:
            yield f"event: error\n{error}"

    AnthropicServingMessages.message_stream_converter = convert_and_pass_on  # type: ignore[method-assign]


def _field_at_fault(validate: Callable[[Any], object], body: Any) -> str | None:
    """Return the field without which a body breaks no validator, or None; long values are shortened before."""
    short = _shortened(body)
    if not isinstance(short, dict) or _outcome(validate, short) != "breaks":
        return None
    without = {field: _outcome(validate, {name: short[name] for name in short if name != field}) for field in short}
    # without a field that it needs a body is refused before the validator that breaks
    return next((field for end in ("passes", "refused") for field in without if without[field] == end), None)


def _outcome(validate: Callable[[Any], object], body: Any) -> Literal["passes", "refused", "breaks"]:
    try:
        validate(body)
    except _UNEXPECTED:
        return "breaks"
    except Exception:  # noqa: BLE001 - an error that vLLM answers with 400
        return "refused"
    return "passes"


def _shortened(value: Any, depth: int = 0) -> Any:
    """Return a value with the first items of its lists and fields, so that validating it takes microseconds."""
    if depth > _DEPTH or isinstance(value, str):
        return value[:_KEPT] if isinstance(value, str) else None
    if isinstance(value, list):
        return [_shortened(item, depth + 1) for item in value[:1]]
    if isinstance(value, dict):
        return {name: _shortened(value[name], depth + 1) for name in [*value][:_KEPT]}
    return value


def _fields_of(params: Any) -> dict[str, Any]:
    return {name: getattr(params, name) for name in getattr(params, "__struct_fields__", ())}


def _outside_64_bits(fields: dict[str, Any]) -> Iterator[str]:
    """Yield the path of each such integer, without recursion: a schema may be nested deeply."""
    todo: list[tuple[str, Any]] = [("", fields)]
    while todo:
        path, value = todo.pop()
        if isinstance(value, int) and not _LEAST <= value <= _MOST:
            yield path
        elif dataclasses.is_dataclass(value):
            todo += [(f"{path}.{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)]
        elif isinstance(value, dict):
            todo += [(f"{path}.{key}".lstrip("."), item) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            todo += [(f"{path}[{index}]", item) for index, item in enumerate(value)]
