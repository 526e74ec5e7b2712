"""The canary: what is asked of the engine, and which differences are noise."""

from __future__ import annotations

import asyncio
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from vllm_service.canary import TOKENS, TOLERANCE, Canary, compare, generate_canary

NAN = math.nan


def canary_of(*places: tuple[int, dict[int, float]]) -> Canary:
    """Return a canary from the token and the logprobs at each place."""
    return Canary(tuple(token for token, _ in places), tuple(logprobs for _, logprobs in places))


BEFORE = canary_of((7, {7: -0.1, 8: -2.5}), (3, {3: -0.2, 4: -1.9}), (5, {5: -0.3, 6: -4.0}))


def changed(place: int, token: int, logprobs: dict[int, float]) -> Canary:
    """Return the canary with another token or other logprobs at one place, counted from 1."""
    places = list(zip(BEFORE.tokens, BEFORE.logprobs, strict=True))
    places[place - 1] = (token, logprobs)
    return canary_of(*places)


def test_compare_of_the_same_is_none() -> None:
    """A batch of one repeats to the bit."""
    assert compare(BEFORE, canary_of(*zip(BEFORE.tokens, BEFORE.logprobs, strict=True))) is None


def test_compare_of_what_does_not_generate_is_none() -> None:
    """An embedding model generates nothing, before and after."""
    assert compare(Canary(), Canary()) is None


@pytest.mark.parametrize("drift", [TOLERANCE / 2, -TOLERANCE / 2])
def test_compare_within_the_noise_of_kernels_is_none(drift: float) -> None:
    """Atomics in GPU kernels add up in another order."""
    assert compare(BEFORE, changed(2, 3, {3: -0.2 + drift, 4: -1.9})) is None


@pytest.mark.parametrize("drift", [TOLERANCE * 1.5, -TOLERANCE * 1.5])
def test_compare_beyond_the_noise_names_both_values(drift: float) -> None:
    """The token is the same, the memory behind it is not."""
    difference = compare(BEFORE, changed(2, 3, {3: -0.2 + drift, 4: -1.9}))

    assert difference == f"token 2 has logprob {-0.2 + drift:.3f} instead of -0.200"


@pytest.mark.parametrize(
    ("place", "token", "logprobs"),
    [
        (1, 8, {8: -0.1, 7: -2.5}),
        (3, 6, {6: -0.3, 5: -4.0}),
        (2, 9, {9: -0.2, 3: -0.21}),  # near now, and nowhere to be seen before
        (2, 4, {4: -1.9, 9: -2.0}),  # what it was before is nowhere near now
    ],
)
def test_compare_with_another_token_names_both(place: int, token: int, logprobs: dict[int, float]) -> None:
    """The first place that differs is named."""
    difference = compare(BEFORE, changed(place, token, logprobs))

    assert difference == f"token {place} is {token} instead of {BEFORE.tokens[place - 1]}"


def test_compare_between_two_tied_tokens_is_none() -> None:
    """Either is right, and what follows another token cannot be compared."""
    before = canary_of((7, {7: -0.70, 8: -0.72}), (3, {3: -0.2, 4: -1.9}))
    after = canary_of((8, {8: -0.71, 7: -0.73}), (9, {9: -0.1, 1: -3.0}))

    assert compare(before, after) is None


def test_compare_between_tokens_that_were_tied_only_before_is_a_difference() -> None:
    """A tie that came apart is more than noise."""
    before = canary_of((7, {7: -0.70, 8: -0.72}))
    after = canary_of((8, {8: -0.1, 7: -3.0}))

    assert compare(before, after) == "token 1 is 8 instead of 7"


@pytest.mark.parametrize(
    ("before", "after"), [(-0.2, NAN), (NAN, -0.2), (NAN, NAN), (-0.2, -math.inf), (-0.2, math.inf)]
)
def test_compare_with_nan_is_a_difference(before: float, after: float) -> None:
    """An engine full of NaN is broken, also when it was before."""
    assert compare(canary_of((3, {3: before})), canary_of((3, {3: after}))) is not None


@pytest.mark.parametrize("length", [0, 2])
def test_compare_with_another_length_is_a_difference(length: int) -> None:
    """The canary is of a fixed length: fewer tokens are a failure."""
    short = Canary(BEFORE.tokens[:length], BEFORE.logprobs[:length])

    assert compare(BEFORE, short) == f"{length} tokens instead of 3"
    assert compare(short, BEFORE) == f"3 tokens instead of {length}"


class Engine:
    """An engine that records its requests and answers in pieces, as vLLM does."""

    def __init__(self, *tasks: str) -> None:
        self.tasks = tasks
        self.model_config = SimpleNamespace(get_vocab_size=lambda: 1024)
        self.asked: list[tuple[Any, Any]] = []

    async def get_supported_tasks(self) -> tuple[str, ...]:
        """Return what it can do."""
        return self.tasks

    async def generate(self, prompt: Any, params: Any, *, request_id: str) -> Any:
        """Generate two tokens, one after the other; each output has all so far."""
        assert request_id == "canary"
        self.asked.append((prompt, params))
        places = [{token: SimpleNamespace(logprob=-0.1 * token)} for token in (1, 2)]
        for count in (1, 2):
            logprobs = places[:count] if params.logprobs else None
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1, 2][:count], logprobs=logprobs)])


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the parameters of vLLM, which is not installed here, be what they were called with."""

    class SamplingParams(SimpleNamespace):
        def __init__(self, *, temperature: float, max_tokens: int, ignore_eos: bool, logprobs: int | None) -> None:
            super().__init__(temperature=temperature, max_tokens=max_tokens, ignore_eos=ignore_eos, logprobs=logprobs)

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SamplingParams))


def test_canary_generated_twice_asks_the_same() -> None:
    """Greedy, of a fixed length, whatever the model thinks of an end; the whole canary comes back."""
    engine = Engine("generate")
    canaries = [asyncio.run(generate_canary(engine, with_logprobs=True)) for _ in range(2)]

    assert canaries[0] == canaries[1] == Canary((1, 2), ({1: -0.1}, {2: -0.2}))
    assert engine.asked[0] == engine.asked[1]
    params = engine.asked[0][1]
    assert (params.temperature, params.max_tokens, params.ignore_eos) == (0.0, TOKENS, True)
    assert len(engine.asked[0][0]["prompt_token_ids"]) == 32


def test_canary_that_is_compared_with_none_asks_for_no_logprobs() -> None:
    """They cost a kernel."""
    engine = Engine("generate")

    assert asyncio.run(generate_canary(engine, with_logprobs=False)) == Canary((1, 2), ())
    assert engine.asked[0][1].logprobs is None


def test_canary_of_a_model_that_does_not_generate_is_empty() -> None:
    """An embedding model is asked nothing."""
    engine = Engine("embed")

    assert asyncio.run(generate_canary(engine, with_logprobs=True)) == Canary()
    assert engine.asked == []
