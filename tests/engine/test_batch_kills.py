"""A batch on a real engine, with kills at random moments; `make soak` runs 10,000 lines and 20 kills."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from bench.batch_kills import Kind, Outcome, RelayedSite, run

from .guarded import Guarded

LINES = 300


@pytest.mark.parametrize("seed", [random.SystemRandom().randrange(1 << 30)], ids=["seed"])
def test_batch_with_three_kills_has_each_answer_once(generating: Guarded, tmp_path: Path, seed: int) -> None:
    """The gateway, which drives it, is killed twice, and its engine is lost once; no answer is lost or there twice."""
    kinds: list[Kind] = ["gateway", "gateway", "engine"]
    random.Random(seed).shuffle(kinds)  # noqa: S311 - no secret

    async def work() -> Outcome:
        async with RelayedSite(tmp_path, generating.port, generating.key or "") as site:
            return await run(site, LINES, kinds, seed, timeout_s=120)

    before = generating.requests_seen()
    outcome = asyncio.run(work())

    assert outcome.good, (seed, outcome)
    assert outcome.answered == LINES
    assert generating.requests_seen() - before <= LINES + 3 * 64 + 20  # what was in flight is sent again
