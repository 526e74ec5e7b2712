"""One API client at its worst, behind nothing but the guard; `make bench-hold` has every input, and the gateway."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.hold import ALICE, BOB, Service
from bench.hold_inputs import inputs

from .guarded import KEYS, Guarded

SECONDS = 1.0
CONNECTIONS = 16
WITHIN_S = 15  # of one token, on a busy machine; without the shares of clients it took 37 s and over 120 s


@pytest.mark.parametrize("name", ["1,024 prompts of 1,000 tokens", "16 answers of 1,000 tokens"])
def test_client_is_served_while_another_fills_the_engine(generating: Guarded, name: str) -> None:
    """The inputs of the benchmark that cost the engine most, on more connections."""
    assert KEYS[:2] == (ALICE, BOB)
    attack = next(each for each in inputs() if each.name == name)

    seen = Service(generating.port, generating.pid).observe(replace(attack, connections=CONNECTIONS), SECONDS)

    assert seen.failed == []
    assert max(seen.waits_s) < WITHIN_S
