"""What is said of a constraint that is refused, in plain sentences, and the errors of vLLM that carry it."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from vllm_service.bounded_fork import Bounds
from vllm_service.schema_faults import plain

COMBINATION = "The combination of all tools and constraints"  # where no tool alone is at fault
REMEDY = "Correct it; it was not sent to the model."
_SUBJECTS = {
    "json": "The JSON schema",
    "regex": "The regular expression",
    "choice": "The list of choices",
    "grammar": "The grammar",
    "structural_tag": "The structural tag",
    "json_object": "The JSON object",
}


def subject_of(fields: Iterable[str]) -> str:
    """Return what a constraint with these fields is called."""
    return next((_SUBJECTS[name] for name in fields if name in _SUBJECTS), "The constraint")


def refused(message: str, param: str) -> Exception:
    """Return the error that vLLM answers with 400."""
    error: Exception = _constraint_error()(message, parameter=param)
    return error


def later(why: str) -> Exception:
    """Return the error that vLLM answers with 503."""
    from vllm.exceptions import GracefulHTTPError

    error: Exception = GracefulHTTPError(f"{why}. Send the request again in 5 s.", HTTPStatus.SERVICE_UNAVAILABLE)
    return error


def of_tool(name: str) -> str:
    """Return what a fault in a tool's schema is in."""
    return f"The schema of tool '{name}'"


@functools.cache
def _constraint_error() -> Any:
    """Return the class of the errors; it stands in a function because vLLM is imported late."""
    from vllm.exceptions import VLLMValidationError

    class ConstraintError(VLLMValidationError):
        def __str__(self) -> str:
            return str(self.args[0])  # vLLM's own repeats the parameter in the sentence

    return ConstraintError


def sentence(found: dict[str, Any], bounds: Bounds) -> str:
    """Return why a constraint is refused, after its subject, by the answer to its last step."""
    if "slow" in found:
        tokens, seconds = found["slow"]
        return (
            f"is too ambiguous: to find its first {tokens} tokens took {seconds * 1000:.0f} ms, in which the engine "
            "answers nobody. Put something that must come between repetitions, or repeat without a count."
        )
    if "fault" in found:
        return f"does not compile: {plain(found['fault'])}. {REMEDY}"
    match found["exceeded"]:
        case "cpu":
            return f"takes more than {bounds.cpu_s:g} s of processor time to compile. Make it simpler or shorter."
        case how:
            memory = f"takes more than {bounds.memory_bytes // 1024**2} MiB of memory to compile"
            crash = "" if how == "memory" else f", or crashes the compiler ({how})"
            return f"{memory}{crash}. Make it simpler or shorter."
