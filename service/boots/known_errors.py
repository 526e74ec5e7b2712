"""Errors that users of such a service meet, recognised by their words: what each means, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from service.boots.failures import MEMORY

_SHOWN = 100  # characters of a line


@dataclass(frozen=True)
class KnownError:
    """A kind of error.

    Attributes:
        name: Short.
        pattern: Its literal words, as Modal, vLLM, PyTorch, the hub, the API, or people who report it write them.
        meaning: One sentence.
        next: What to do.
        is_fault: It is no part of how the service works.
    """

    name: str
    pattern: re.Pattern[str]
    meaning: str
    next: str
    is_fault: bool = True


@dataclass(frozen=True)
class Recognised:
    """An error in a text: the first line that has it, its number, and how many lines have it."""

    error: KnownError
    line: str
    number: int
    count: int = 1


# The first one that a line matches counts: a 401 of the hub is no 401 of the gateway.
KNOWN = (
    KnownError(
        "endpoint limit",
        re.compile(r"(?i)endpoint limit|limit(ed)? (of|to) \d+ (web )?endpoints|(exceed|too many).{0,40}\bendpoints"),
        "Modal allows a workspace only so many web endpoints, 8 on the free plan.",
        "Serve many models from one tier (deploy without --per-model), or free one: vllm-service stop --gpu G.",
    ),
    KnownError(
        "model download",
        re.compile(
            r"(?i)error downloading|download fail|(401|403) client error.{0,80}(huggingface|/resolve/)|gatedrepo"
            r"|(cannot )?access (to )?(a )?gated|repositorynotfound|localentrynotfound|revisionnotfound"
            r"|accepted (its|the model's) licence"
        ),
        "The weights were not fetched: the name, the commit, the licence, the token, or room on the disk is wrong.",
        "Accept the licence at the hub, put HF_TOKEN into secret 'huggingface', then: "
        "vllm-service prefetch --modal MODEL, which names the reason.",
    ),
    KnownError(
        "GPU memory",
        re.compile(f"(?i){MEMORY.pattern}"),
        "Weights, context and requests are more than the GPU's memory.",
        "Choose a larger GPU (vllm-service deploy MODEL --gpu H200), or lower max_model_len in the model's entry or "
        "SERVICE_MAX_INPUTS.",
    ),
    KnownError(
        "start-up time-out",
        re.compile(r"(?i)failed to start within|not ready within \d+ s\b|start-?up.{0,20}time[sd]?[ -]?out"),
        "The boot took longer than it may.",
        "Fetch the weights first (vllm-service prefetch --modal MODEL), keep SERVICE_FAST_BOOT=true, or raise "
        "SERVICE_STARTUP_TIMEOUT_S; 'vllm-service boots --modal' shows which phase took the time.",
    ),
    KnownError(
        "compilation",
        re.compile(
            r"(?i)torch compilation failed|backendcompilerfailed|inductorerror|torch\._(dynamo|inductor)\.exc"
            r"|no kernel image|nvcc fatal|triton.{0,20}compil\w* (error|fail)"
        ),
        "torch.compile or a kernel does not work on this GPU.",
        "Set SERVICE_FAST_BOOT=true, which passes --enforce-eager, or take another GPU.",
    ),
    KnownError(
        "401",
        re.compile(
            r"(?i)invalid_api_key|a valid api key is needed|incorrect api key|authentication ?failed"
            r"|error code: 401|\b401\b.{0,20}unauthorized|\" 401\b|status\W{1,4}401\b"
        ),
        "The service does not know the key of the request.",
        "Send 'Authorization: Bearer <key>' with a key that the first deploy or 'vllm-service keys new' has printed. A "
        "new one: vllm-service keys new NAME, of a deployed service with --modal and an admin key in VLLM_API_KEY.",
    ),
    KnownError(
        "cold start",
        re.compile(r"(?i)model_waking|has been waking for|^: waking |first request takes|cold start"),
        "The pool was scaled to zero, so the first request waits for a boot.",
        "Keep a replica up (vllm-service scale MODEL --min 1), raise SERVICE_SCALEDOWN_WINDOW, or ask for a stream, "
        "which is held until the model is ready.",
        is_fault=False,
    ),
)


def recognise(lines: Iterable[str]) -> list[Recognised]:
    """Return the known errors of a text, in the order of their first lines."""
    found: dict[str, Recognised] = {}
    for number, error, line in _matches(lines):
        first = found.get(error.name)
        found[error.name] = Recognised(
            error,
            first.line if first else line.strip()[:_SHOWN],
            first.number if first else number,
            first.count + 1 if first else 1,
        )
    return list(found.values())


def _matches(lines: Iterable[str]) -> Iterator[tuple[int, KnownError, str]]:
    for number, line in enumerate(lines, 1):
        if error := next((one for one in KNOWN if one.pattern.search(line[:2000])), None):
            yield number, error, line
