"""Prompts of about a number of tokens, each with another beginning, so that no prefix is in the engine's cache."""

from __future__ import annotations

import random
from collections.abc import Sequence

_TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city name team minute idea body back parent face level office door "
    "health person art war history party result change morning reason research girl moment air teacher force education"
)
_WORDS = _TEXT.split()


def sample(count: int = 100, seed: int = 0) -> str:
    """Return some words, by which the tokens of a word are counted."""
    return " ".join(random.Random(seed).choices(_WORDS, k=count))  # noqa: S311 - no secret


def build(count: int, tokens: int, tokens_per_word: float, seed: int = 1) -> Sequence[str]:
    """Return `count` prompts; the same seed gives the same ones."""
    choose = random.Random(seed)  # noqa: S311 - no secret
    words = max(round(tokens / tokens_per_word) - 1, 1)
    return [f"{choose.randrange(10**6)} {' '.join(choose.choices(_WORDS, k=words))}" for _ in range(count)]
