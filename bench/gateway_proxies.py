"""Our gateway, LiteLLM and nginx in front of the same stub, in turns: the latency each adds, and its throughput."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bench.gateway_candidates import DIRECT, GATEWAY, LITELLM, NGINX, Candidate, Candidates, NotMeasuredError, installed
from bench.gateway_figures import Figures
from bench.gateway_load import Done, Load, Work
from bench.gateway_stub import instruction

ANSWER_BYTES = 1024
MANY = 64
# 64,000 chunks/s in all: far more than one engine sends to 64 users, and more than a Python proxy can forward
CHUNKS, CHUNKS_PER_S = 100, 1000
FLOOD_CHUNKS = 1000
_WARM = Work(0, "", "", instruction("answer", ANSWER_BYTES))


@dataclass(frozen=True)
class Kind:
    """One kind of work for the candidates.

    Attributes:
        name: What the results call it.
        work: What the clients do.
        slow: Whether LiteLLM does it too; it would need more time for the flood than all else together.
    """

    name: str
    work: Work
    slow: bool = True


def _kinds() -> list[Kind]:
    answer = replace(_WARM, seconds=1.5, warm_s=0.2)
    stream = replace(answer, message=instruction("stream", 10), stream=True)
    paced = replace(stream, message=instruction("stream", CHUNKS, CHUNKS_PER_S), seconds=2.5, warm_s=0.5, clients=MANY)
    return [
        Kind("c=1 answer", answer),
        Kind("c=1 stream", stream),
        Kind(f"c={MANY} answer", replace(answer, clients=MANY, seconds=2.5, warm_s=0.5)),
        Kind(f"c={MANY} stream", paced),
        Kind(f"c={MANY} flood", replace(paced, message=instruction("stream", FLOOD_CHUNKS), seconds=1.5), slow=False),
    ]


ONE, ONE_STREAM, ANSWERS, STREAMS, FLOOD = (kind.name for kind in _kinds())


class Proxies:
    """Runs the rounds and evaluates them.

    Args:
        candidates: Starts each proxy.
        load: The clients.
        figures: Where the results go.
    """

    def __init__(self, candidates: Candidates, load: Load, figures: Figures) -> None:
        self._load, self._figures = load, figures
        self._done: dict[tuple[str, str], list[Done]] = {}
        self._candidates: list[Candidate] = []
        figures.versions |= installed()
        for name in (DIRECT, GATEWAY, LITELLM, NGINX):
            try:
                self._candidates.append(candidates.start(name))
            except NotMeasuredError as error:
                figures.missing(name, str(error))
            else:
                warm(self._candidates[-1], load)

    def run(self, rounds: int) -> None:
        """Measure, print each round, and record the figures."""
        for number in range(rounds):
            turn = number % len(self._candidates)
            for candidate in self._candidates[turn:] + self._candidates[:turn]:
                self._measure(number + 1, candidate)
        self._latency()
        self._throughput()

    def _measure(self, number: int, candidate: Candidate) -> None:
        results = []
        for kind in _kinds():
            if candidate.name == LITELLM and not kind.slow:
                continue
            done = self._load.run(at(candidate, kind.work))
            self._done.setdefault((candidate.name, kind.name), []).append(done)
            speed = f"{done.chunks_per_s:.0f} chunks/s" if kind.work.stream else f"{done.requests_per_s:.0f}/s"
            results.append(f"{kind.name} {done.p50_ms:.2f}/{done.p99_ms:.2f} ms {speed}")
        print(f"round {number} {candidate.name:<8}" + " · ".join(results), flush=True)

    def _latency(self) -> None:
        take = self._figures.at_most
        for kind in (ONE, ONE_STREAM):
            take(f"added time to first byte, {kind}, p50", self._added(GATEWAY, kind, "p50_ms"), 1.0, "ms")
            take(f"added time to first byte, {kind}, p99", self._added(GATEWAY, kind, "p99_ms"), 3.0, "ms")
        for kind in (ANSWERS, STREAMS):
            pairs = zip(self._added(GATEWAY, kind, "p99_ms"), self._added(LITELLM, kind, "p99_ms"), strict=True)
            take(f"added p99, {kind}, of LiteLLM's", [ours / theirs for ours, theirs in pairs], 0.2)
        for name in self._others:
            for kind in (ONE, ONE_STREAM, ANSWERS):
                self._figures.series(f"{name}: added, {kind}, p50", self._added(name, kind, "p50_ms"), "ms")
                self._figures.series(f"{name}: added, {kind}, p99", self._added(name, kind, "p99_ms"), "ms")

    def _throughput(self) -> None:
        figures = self._figures
        figures.at_least(f"requests/s, {ANSWERS}, times LiteLLM's", self._ratio(LITELLM, ANSWERS, "requests"), 5)
        figures.at_least(f"streamed chunks/s, {STREAMS}, times LiteLLM's", self._ratio(LITELLM, STREAMS, "chunks"), 5)
        if NGINX in self._others:
            figures.at_most(f"requests/s, {ANSWERS}, of nginx'", self._ratio(NGINX, ANSWERS, "requests"), None)
            for kind in (STREAMS, FLOOD):
                figures.at_most(f"streamed chunks/s, {kind}, of nginx'", self._ratio(NGINX, kind, "chunks"), None)
        for name, kind in self._done:
            if kind == ANSWERS:
                figures.series(f"{name}: requests/s, {kind}", self._each(name, kind, "requests_per_s"))
            elif kind in {STREAMS, FLOOD}:
                figures.series(f"{name}: chunks/s, {kind}", self._each(name, kind, "chunks_per_s"))
                together = [done.chunks / max(1, done.frames) for done in self._done[name, kind]]
                figures.series(f"{name}: chunks in one piece, {kind}", together)

    @property
    def _others(self) -> list[str]:
        return [candidate.name for candidate in self._candidates if candidate.name not in {DIRECT, GATEWAY}]

    def _each(self, name: str, kind: str, what: str) -> list[float]:
        return [float(getattr(done, what)) for done in self._done[name, kind]]

    def _added(self, name: str, kind: str, what: str) -> list[float]:
        pairs = zip(self._each(name, kind, what), self._each(DIRECT, kind, what), strict=True)
        return [through - direct for through, direct in pairs]

    def _ratio(self, name: str, kind: str, what: str) -> list[float]:
        pairs = zip(self._each(GATEWAY, kind, f"{what}_per_s"), self._each(name, kind, f"{what}_per_s"), strict=True)
        return [ours / theirs for ours, theirs in pairs]


def warm(candidate: Candidate, load: Load) -> None:
    """Send requests before the measurement, so that one-time costs are not measured."""
    load.run(at(candidate, replace(_WARM, clients=8, requests=64)))
    load.run(at(candidate, replace(_WARM, message=instruction("stream", 10), stream=True, clients=8, requests=64)))


def at(candidate: Candidate, work: Work) -> Work:
    """Return this work with the candidate's port, key and model."""
    return replace(work, port=candidate.port, key=candidate.key, model=candidate.model)
