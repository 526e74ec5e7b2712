"""Chaos runs: what their seed determines, and how the answers of clients are judged."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from bench.chaos.kinds import KINDS
from bench.chaos.load import CLOSED, CUT, REFUSED
from bench.chaos.requests import Reply, Request, draw, read
from bench.chaos.run import deck, faults
from service.in_engine.vllm_service.api_error import APIError

DOCS = (Path(__file__).parents[3] / "docs/gateway.md").read_text()


def test_faults_of_a_seed_are_the_same_each_time() -> None:
    """A violation is found again by seed and number alone, whichever faults came before."""
    first, second, other = ([*islice(faults(seed, long=True), 100)] for seed in (1, 1, 2))

    assert first == second
    assert [fault.kind.name for fault in first] != [fault.kind.name for fault in other]
    assert first[70].rng.random() == second[70].rng.random()
    assert len({fault.rng.random() for fault in first}) == 100


def test_deck_of_ci_has_forty_faults_and_a_long_one_every_kind() -> None:
    """Each round has every kind as often as it weighs."""
    names = [fault.kind.name for fault in islice(faults(3, long=False), 80)]

    assert len(deck(long=False)) == 40
    assert {kind.name for kind in deck(long=True)} == {kind.name for kind in KINDS}
    assert Counter(names[:40]) == Counter(names[40:])


def test_codes_that_clients_may_be_told_are_documented() -> None:
    """Each tolerated error stands in the table of docs/gateway.md."""
    told = {code for kind in KINDS for code in kind.tolerates} - {REFUSED, CLOSED, CUT}

    assert [code for code in sorted(told) if f"`{code}`" not in DOCS] == []


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"])
@pytest.mark.parametrize("streams", [False, True])
def test_error_of_every_protocol_is_read(path: str, streams: bool) -> None:
    """As an answer, and as the end of a stream."""
    error = APIError(502, "It is lost.", code="engine_lost")
    body = error.event(path, "m1") if streams else error.body(path, "m1")

    reply = read(path, 200 if streams else 502, body, streams=streams)

    code = "api_error" if path == "/v1/messages" else "engine_lost"
    assert reply.error == (200 if streams else 502, code)


def test_error_without_the_shape_of_its_protocol_is_refused() -> None:
    """An error that is no error's shape counts as wrong."""
    with pytest.raises(TypeError):
        read("/v1/completions", 500, b'{"error": "Internal Server Error"}', streams=False)


def request_with(expected: str | None = None, begins: str = "", tokens: int | None = None) -> Request:
    """Return a request with a right answer."""
    marker = "m0123456789ab"
    return Request(marker, "tiny", "bob", "/v1/completions", {}, expected=expected, begins=begins, tokens=tokens)


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        (Reply("m0123456789ab Once", 1, 8), ""),
        (Reply("m0123456789ab Once and mffffffffffff", 1, 8), "words of another request"),
        (Reply("Once", 1, 8), "at its beginning"),
        (Reply("m0123456789ab Once", 2, 8), "finished 2 times"),
        (Reply("m0123456789ab Once", 0, 8), "finished 0 times"),
        (Reply("m0123456789ab Once", 1, 9), "9 tokens, expected 8"),
    ],
)
def test_answer_is_judged_by_words_ends_and_tokens(reply: Reply, fault: str) -> None:
    """Words of another request, two ends and lost tokens are noticed."""
    found = request_with(begins="m0123456789ab", tokens=8).fault_of(reply)

    assert found == fault if not fault else fault in found


def test_stream_is_read_to_its_end() -> None:
    """Words are joined, ends are counted, comments are left out."""
    pieces = [{"text": "a", "finish_reason": None}, {"text": "b", "finish_reason": "length"}]
    events = [{"choices": [piece]} for piece in pieces] + [{"choices": [], "usage": {"completion_tokens": 2}}]
    body = "".join(f": waiting\n\ndata: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"

    assert read("/v1/completions", 200, body.encode(), streams=True) == Reply("ab", 1, 2)


def test_drawn_requests_have_markers_of_their_own() -> None:
    """No two requests have the same, and both keys and all protocols come up."""
    rng = random.Random(1)  # noqa: S311 - no secret
    drawn = [draw(rng, ["tiny", "twin"]) for _ in range(300)]

    assert len({request.marker for request in drawn}) == 300
    assert {request.key for request in drawn} == {"alice", "bob"}
    assert len({request.path for request in drawn}) == 4
