"""The canary: a short greedy generation whose tokens and logprobs must come out the same after a sleep.

An engine can wake, answer `/health` and generate nonsense, when a restore has brought its memory back wrong. The same
prompt, alone in the batch, before and after: what differs by more than the noise of kernels is a broken engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TOKENS = 8
TOLERANCE = 0.1  # nats; a batch of one repeats to the bit on CPU, atomics in GPU kernels move it by hundredths
PROMPT_TOKENS = 32


@dataclass(frozen=True)
class Canary:
    """What the engine generated.

    Attributes:
        tokens: The generated ids.
        logprobs: For each of them the log probabilities of the likeliest ids at that place, in nats.
    """

    tokens: tuple[int, ...] = ()
    logprobs: tuple[dict[int, float], ...] = ()


def prompt(engine: Any) -> list[int]:
    """Return ids that any vocabulary has for text: the first thousand may stand for images or the ends of things."""
    start = min(1000, engine.model_config.get_vocab_size() // 2)
    return list(range(start, start + PROMPT_TOKENS))


async def generate_canary(engine: Any, *, with_logprobs: bool) -> Canary:
    """Return what the engine generates for the fixed prompt; an empty canary for models that do not generate.

    Args:
        engine: vLLM's.
        with_logprobs: To compare it later. The first time, vLLM compiles a kernel for them.
    """
    if "generate" not in await engine.get_supported_tasks():
        return Canary()
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=2 if with_logprobs else None)
    result: Any = None
    async for output in engine.generate({"prompt_token_ids": prompt(engine)}, greedy, request_id="canary"):
        result = output.outputs[0]
    places = tuple({token: place.logprob for token, place in likeliest.items()} for likeliest in result.logprobs or ())
    return Canary(tuple(result.token_ids), places)


def compare(before: Canary, after: Canary) -> str | None:
    """Return what is different, as a text; None when the two are the same but for noise.

    Where the two likeliest tokens are nearer to each other than the tolerance, either is right, and what follows
    cannot be compared.
    """
    if len(before.tokens) != len(after.tokens):
        return f"{len(after.tokens)} tokens instead of {len(before.tokens)}"
    for place, (expected, token) in enumerate(zip(before.tokens, after.tokens, strict=True)):
        known, found = before.logprobs[place], after.logprobs[place]
        if token != expected:
            tied = _near(known.get(token), known[expected]) and _near(found.get(expected), found[token])
            return None if tied else f"token {place + 1} is {token} instead of {expected}"
        if not _near(found[token], known[token]):
            return f"token {place + 1} has logprob {found[token]:.3f} instead of {known[token]:.3f}"
    return None


def _near(one: float | None, other: float) -> bool:
    return one is not None and abs(one - other) <= TOLERANCE  # false for NaN
