"""Our gateway and others in front of the same stub, in turns: the latency that each adds, and its throughput."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

from bench.gateway_candidates import (
    DIRECT,
    GATEWAY,
    LITELLM,
    NGINX,
    ROUTER,
    SMG,
    Candidate,
    Candidates,
    NotMeasuredError,
    installed,
)
from bench.gateway_figures import Figures
from bench.gateway_load import Done, Load, Work
from bench.gateway_stub import instruction

ANSWER_BYTES = 1024
MANY = 64
# 64,000 chunks/s in all: far more than one engine sends to 64 users, and more than a Python proxy can forward
CHUNKS, CHUNKS_PER_S = 100, 1000
FLOOD_CHUNKS = 1000
SLOW_ROUNDS = 2  # of LiteLLM, which takes as long for one as all others together
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
    answer = replace(_WARM, seconds=0.7, warm_s=0.1)
    stream = replace(answer, message=instruction("stream", 10), stream=True)
    paced = replace(stream, message=instruction("stream", CHUNKS, CHUNKS_PER_S), seconds=1.5, warm_s=0.4, clients=MANY)
    return [
        Kind("c=1 answer", answer),
        Kind("c=1 stream", stream),
        Kind(f"c={MANY} answer", replace(answer, clients=MANY, seconds=1.0, warm_s=0.3)),
        Kind(f"c={MANY} stream", paced),
        Kind(
            f"c={MANY} flood",
            replace(paced, message=instruction("stream", FLOOD_CHUNKS), seconds=0.8, warm_s=0.3),
            slow=False,
        ),
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
        for name in (DIRECT, GATEWAY, ROUTER, SMG, NGINX, LITELLM):
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
        self._beside_others()
        self._print_table()

    def _measure(self, number: int, candidate: Candidate) -> None:
        results = []
        for kind in _kinds():
            if candidate.name == LITELLM and not (kind.slow and number <= SLOW_ROUNDS):
                continue
            done = self._load.run(at(candidate, kind.work))
            self._done.setdefault((candidate.name, kind.name), []).append(done)
            speed = f"{done.chunks_per_s:.0f} chunks/s" if kind.work.stream else f"{done.requests_per_s:.0f}/s"
            results.append(f"{kind.name} {done.p50_ms:.2f}/{done.p99_ms:.2f} ms {speed}")
        if results:
            print(f"round {number} {candidate.name:<12}" + " · ".join(results), flush=True)

    def _latency(self) -> None:
        take = self._figures.at_most
        for kind in (ONE, ONE_STREAM):
            take(f"added time to first byte, {kind}, p50", self._added(GATEWAY, kind, "p50_ms"), 1.0, "ms")
            take(f"added time to first byte, {kind}, p99", self._added(GATEWAY, kind, "p99_ms"), 3.0, "ms")
        for kind in (ANSWERS, STREAMS):
            pairs = zip(self._added(GATEWAY, kind, "p99_ms"), self._added(LITELLM, kind, "p99_ms"), strict=False)
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
            figures.at_most(f"streamed chunks/s, {STREAMS}, of nginx'", self._ratio(NGINX, STREAMS, "chunks"), None)
        for name, kind in self._done:
            if kind == ANSWERS:
                figures.series(f"{name}: requests/s, {kind}", self._each(name, kind, "requests_per_s"))
            elif kind in {STREAMS, FLOOD}:
                figures.series(f"{name}: chunks/s, {kind}", self._each(name, kind, "chunks_per_s"))
                together = [done.chunks / max(1, done.frames) for done in self._done[name, kind]]
                figures.series(f"{name}: chunks in one piece, {kind}", together)

    def _beside_others(self) -> None:
        """Compare with what was measured before: 4,120 answers/s, vllm-router 18,900, nginx 51,900; flood 633,000."""
        figures = self._figures
        figures.at_most(f"time to first byte, {ONE}, p50", self._each(GATEWAY, ONE, "p50_ms"), 0.30, "ms")
        figures.at_most(f"time to first byte, {STREAMS}, p50", self._each(GATEWAY, STREAMS, "p50_ms"), 3.0, "ms")
        if ROUTER in self._others:
            ratios = self._ratio(ROUTER, ANSWERS, "requests")
            figures.at_least(f"requests/s, {ANSWERS}, of vllm-router's", ratios, 0.545)
        if NGINX in self._others:
            figures.at_least(f"requests/s, {ANSWERS}, of nginx'", self._ratio(NGINX, ANSWERS, "requests"), 0.198)
            figures.at_least(f"streamed chunks/s, {FLOOD}, of nginx'", self._ratio(NGINX, FLOOD, "chunks"), 0.245)
        for candidate in self._candidates:
            if candidate.pid:
                figures.series(f"{candidate.name}: memory after the load", [candidate.memory[0] / 1e6], "MB")

    def _print_table(self) -> None:
        """Print each candidate's medians, and in brackets our gateway's as a multiple of them."""
        columns = (
            (ONE, "p50_ms", "one client, p50 ms"),
            (ANSWERS, "requests_per_s", "answers/s"),
            (STREAMS, "chunks_per_s", "paced chunks/s"),
            (STREAMS, "p50_ms", "paced, p50 ms"),
            (FLOOD, "chunks_per_s", "flood chunks/s"),
        )
        lines = ["".join([" " * 12, *(f"{title:>24}" for _, _, title in columns), f"{'memory MB':>12}"])]
        for candidate in self._candidates:
            cells = []
            for kind, what, _ in columns:
                if (candidate.name, kind) not in self._done:
                    cells.append("-")
                    continue
                ours, theirs = (statistics.median(self._each(name, kind, what)) for name in (GATEWAY, candidate.name))
                cells.append(
                    f"{theirs:,.2f} (x{ours / max(theirs, 0.01):.2f})"
                    if theirs < 1000
                    else f"{theirs:,.0f} (x{ours / theirs:.2f})"
                )
            memory = f"{candidate.memory[0] / 1e6:.0f}" if candidate.pid else "-"
            lines.append("".join([f"{candidate.name:<12}", *(f"{cell:>24}" for cell in cells), f"{memory:>12}"]))
        print("\n".join(["", *lines, "(x: our gateway's figure of this one's)", ""]), flush=True)

    @property
    def _others(self) -> list[str]:
        return [candidate.name for candidate in self._candidates if candidate.name not in {DIRECT, GATEWAY}]

    def _each(self, name: str, kind: str, what: str) -> list[float]:
        return [float(getattr(done, what)) for done in self._done[name, kind]]

    def _added(self, name: str, kind: str, what: str) -> list[float]:
        pairs = zip(self._each(name, kind, what), self._each(DIRECT, kind, what), strict=False)  # of the same rounds
        return [through - direct for through, direct in pairs]

    def _ratio(self, name: str, kind: str, what: str) -> list[float]:
        pairs = zip(self._each(GATEWAY, kind, f"{what}_per_s"), self._each(name, kind, f"{what}_per_s"), strict=False)
        return [ours / max(theirs, 1.0) for ours, theirs in pairs]  # on a busy machine LiteLLM may have answered none


def warm(candidate: Candidate, load: Load) -> None:
    """Send requests before the measurement, so that one-time costs are not measured."""
    load.run(at(candidate, replace(_WARM, clients=8, requests=64)))
    load.run(at(candidate, replace(_WARM, message=instruction("stream", 10), stream=True, clients=8, requests=64)))


def at(candidate: Candidate, work: Work) -> Work:
    """Return this work with the candidate's port, key and model."""
    return replace(work, port=candidate.port, key=candidate.key, model=candidate.model)
