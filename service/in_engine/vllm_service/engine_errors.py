"""The engine's own errors as errors of this API: their status, a word as code, and what agents look for in the message.

Source of the sentences: vLLM 0.32, `vllm/renderers/params.py`, `vllm/v1/engine/input_processor.py`,
`vllm/entrypoints/serve/utils/api_utils.py` and `vllm/entrypoints/openai/responses/serving.py`.
"""

from __future__ import annotations

import json
import re
from typing import Any

from .api_error import APIError
from .http_contract import Protocol, protocol_of

_LOST = "ended during this request. Send it again: another engine takes over."
_DEAD = "EngineCore encountered an issue"  # vLLM's EngineDeadError
_CLIENTS = (ValueError, TypeError, OverflowError)
_OVERLOADED_RETRY_S = 5
_SHOWN = 1000  # characters of an answer that is not JSON
# Each has the most tokens that the model takes, and most have the tokens of the prompt.
_OVERFLOWS = [
    re.compile(pattern)
    for pattern in (
        r"maximum context length is (?P<most>\d+) tokens.*? contains (?:at least )?(?P<tokens>\d+) input tokens",
        r"maximum context length is (?P<most>\d+) tokens.*? contains \d+ characters",
        r"Input length \((?P<tokens>\d+)\) exceeds model's maximum context length \((?P<most>\d+)\)",
        r"prompt length (?P<tokens>\d+) exceeds the max_model_len (?P<most>\d+)",
        r"prompt \(length (?P<tokens>\d+)\).* longer than the maximum model length of (?P<most>\d+)",
    )
]
_LACKS_TOOL_PARSER = "--tool-call-parser to be set"  # of `vllm/renderers/online_renderer.py`
_AUDIO_ADVICE = re.compile(r" Set VLLM_MAX_AUDIO_\w+ to increase this limit\.")  # to whom sends recordings, in vain
_NAMED = re.compile(r"([a-z_]+) must be ")  # how vLLM's own checks of sampling parameters begin
_STATUSES = {"invalid_request_error": 400, "api_error": 502, "overloaded_error": 503}  # Anthropic's events have none
_PROMPTS = {  # fields with the prompt
    **{"/v1/completions": "prompt", "/v1/responses": "input", "/v1/embeddings": "input", "/classify": "input"},
    **{"/v1/rerank": "documents", "/v1/score": "documents"},
    **{"/v1/audio/transcriptions": "prompt", "/v1/audio/translations": "prompt"},
}
_PROMPT_TOO_LONG = "prompt is too long: "  # Anthropic's words, on which agents shorten the conversation


_engine: Any = None


def watch(engine: Any) -> None:
    """Read from now on whether this engine's core died: on some paths vLLM replaces the words that say so."""
    global _engine  # noqa: PLW0603 - one engine a process
    _engine = engine


def _core_died() -> bool:
    return _engine is not None and bool(_engine.errored)


def engine_lost(engine: str = "The engine") -> APIError:
    """Return the error of a request whose engine died; `engine` begins the sentence."""
    return APIError(502, f"{engine} {_LOST}", code="engine_lost", retry_after_s=1)


def engine_error() -> APIError:
    """Return the error of a request at which the engine failed: the reason is for its log, not for the client."""
    return APIError(502, "The engine failed at this request. Its log has the reason under the request's id.")


def is_clients(error: BaseException) -> bool:
    """Tell whether vLLM raised because of what a client sent, by vLLM's own rule."""
    return isinstance(error, _CLIENTS) or any(kind.__name__ == "VLLMClientError" for kind in type(error).__mro__)


def from_exception(path: str, error: Exception) -> APIError:
    """Return the error of a request at which vLLM raised; by vLLM's own rule for those of the client."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # Starlette wraps what its handlers cannot answer since the answer has begun
    if _core_died() or _DEAD in str(error):
        return engine_lost()
    if not is_clients(error):
        return engine_error()
    return _translated(path, 400, str(error), getattr(error, "parameter", None))


def from_answer(path: str, status: int, body: bytes) -> APIError:
    """Return the error that an engine's answer with a status of 400 or more stands for."""
    try:
        return _from_json(path, status, json.loads(body))
    except (ValueError, RecursionError):
        return _translated(path, status, body[:_SHOWN].decode(errors="replace").strip())


def from_event(path: str, event: bytes) -> APIError:
    """Return the error that an error event in an engine's stream stands for."""
    try:
        data = json.loads(event.partition(b"data: ")[2].partition(b"\n")[0])
        error = data["error"]
        statuses = (error.get("status"), error.get("code"), _STATUSES.get(str(error.get("type"))))
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError):
        return engine_error()
    return _from_json(path, next((status for status in statuses if isinstance(status, int)), 500), data)


def last_event(path: str, tail: bytes) -> APIError | None:
    """Return the error with which the guard ended a stream, by its last bytes; None: it ended well."""
    at = max(tail.rfind(b'data: {"error": {'), tail.rfind(b"event: error\n"))
    return from_event(path, tail[at:]) if at >= 0 else None


def _from_json(path: str, status: int, answer: Any) -> APIError:
    fields = answer if isinstance(answer, dict) else {}
    error = fields.get("error", fields.get("detail"))
    if not isinstance(error, dict):
        return _translated(path, status, error if isinstance(error, str) else json.dumps(answer)[:_SHOWN])
    message, code, param = str(error.get("message", "")), error.get("code"), error.get("param")
    if isinstance(code, str) or "request_id" in fields:  # the guard has reshaped it already
        return APIError(status, message, code=code if isinstance(code, str) else None, param=param)
    return _translated(path, status, message, param)


def _translated(path: str, status: int, message: str, param: str | None = None) -> APIError:
    if status >= 500 and status != 501:
        return _failed(status, message)
    if too_long := _overflow(path, message) or _too_long_recording(path, message):
        return too_long
    if status == 404 and message == "Not Found":
        return unsupported_by_model(path, "the engine of this model does not have it", "Choose another model.")
    if status == 501:  # it will never be implemented by a retry
        return APIError(400, message, code="not_supported", param=param)
    if message.endswith(_LACKS_TOOL_PARSER):
        return tools_not_supported()
    message = message.replace("the VLLM_MAX_N_SEQUENCES environment variable", "SERVICE_MAX_N")
    if protocol_of(path) is Protocol.ANTHROPIC:  # vLLM answers it as a chat, whose field has another name
        message = message.replace("max_completion_tokens", "max_tokens")
    if not param and (named := _NAMED.match(message)):
        param = named[1]
    param = param.removeprefix("body.") if param else None
    code = "model_not_found" if status == 404 and param == "model" else None
    if param and status in {400, 422}:
        code = "invalid_value"
    return APIError(status, message or "The engine gave no reason.", code=code, param=param)


def _failed(status: int, message: str) -> APIError:
    if _DEAD in message or _core_died():
        return engine_lost()
    if status == 503:
        return APIError(503, message, code="engine_overloaded", retry_after_s=_OVERLOADED_RETRY_S)
    return engine_error()


def unsupported_by_model(path: str, why: str, advice: str) -> APIError:
    """Return the error of a request for a route that a model's engine does not have."""
    return APIError(400, f"No {path}: {why}. {advice}", code="unsupported_by_model", param="model")


def tools_not_supported() -> APIError:
    """Return the error of a request with tools for a model without a tool parser."""
    return APIError(
        400,
        "This model is served without a tool parser, so it cannot call tools: its family and chat template show none "
        "that vLLM has. Set tool_call_parser in its entry of the models file (and chat_template, where its own has no "
        'place for tools), or send tool_choice "none" or no tools.',
        code="tools_not_supported",
        param="tools",
    )


def _too_long_recording(path: str, message: str) -> APIError | None:
    if not _AUDIO_ADVICE.search(message):
        return None
    message = _AUDIO_ADVICE.sub(" Send it in shorter pieces.", message)
    return APIError(400, message, code="audio_too_long", param="file" if path.startswith("/v1/audio/") else "messages")


def _overflow(path: str, message: str) -> APIError | None:
    found = next((match for pattern in _OVERFLOWS if (match := pattern.search(message))), None)
    if found is None:
        return None
    if protocol_of(path) is Protocol.ANTHROPIC:
        most = int(found["most"])
        tokens = int(found.groupdict().get("tokens") or most + 1)  # vLLM may have counted characters only
        message = f"{_PROMPT_TOO_LONG}{max(tokens, most + 1)} tokens > {most} maximum. {message}"
    param = _PROMPTS.get(path, "messages")
    return APIError(400, message, code="context_length_exceeded", param=param)
