"""The gateway's latency, throughput and memory, compared with other routers and proxies. `make bench-gateway`.

Upstream is a stub that is never the bottleneck. The load runs in a process of its own. The candidates take turns in one
run. The last part uses a real engine, directly and through `vllm-service up`. On a machine where all of them share two
cores, the stub and the clients use processor time that the gateway could use: its throughput is a lower bound there.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import gateway_ledger, gateway_limits
from bench.gateway_candidates import (
    GATEWAY,
    KEY,
    UPSTREAM_KEY,
    Candidates,
    leave_core_to_engine,
    peak,
    reset_peak,
    running,
)
from bench.gateway_figures import Figures
from bench.gateway_load import Load, Work
from bench.gateway_proxies import Proxies, at, warm
from bench.gateway_server import ENGINE_KEY, MODEL
from bench.gateway_stub import instruction
from bench.processes import free_port
from service.gateway.process_limits import connection_limit
from service.local.signals import signals_interrupt

IDLE_STREAMS, IDLE_FIRST = 10_000, 200
BODIES, BODY_BYTES, BODY_REQUESTS = 8, 10_000_000, 24
ANSWER_MS = 300  # long enough for all bodies to be in memory at once
TOKENS, STREAMS, GENERATIONS = 128, 16, 64


@dataclass(frozen=True)
class Bench:
    """What the parts share.

    Attributes:
        load: The clients.
        directory: For files.
    """

    load: Load
    figures: Figures
    directory: Path
    rounds: int

    def proxies(self) -> None:
        """Compare latency and throughput."""
        with Candidates(self.directory) as candidates:
            Proxies(candidates, self.load, self.figures).run(self.rounds)

    def idle(self) -> None:
        """Measure the memory of open, silent streams, on top of some that are open already."""
        with Candidates(self.directory) as candidates:
            gateway = candidates.start(GATEWAY)
            warm(gateway, self.load)
            work = at(gateway, Work(0, "", "", instruction("idle"), stream=True))
            self.load.hold(replace(work, clients=IDLE_FIRST))
            before = gateway.memory
            more = min(IDLE_STREAMS, connection_limit() // 100 * 100) - IDLE_FIRST  # each takes two descriptors
            self.load.hold(replace(work, clients=more))
            after = gateway.memory
            self.load.release()
        for kind, first, then in zip(("resident", "proportional"), before, after, strict=True):
            each = (then - first) / more / 1000
            self.figures.at_most(f"memory of each idle stream, {kind}", [each], 20, "KB")
        self.figures.at_least(
            "idle streams held at once, as the limit of descriptors allows", [more + IDLE_FIRST], 1000
        )
        print(
            f"idle streams: {before[0] / 1e6:.1f} MB with {IDLE_FIRST}, {after[0] / 1e6:.1f} MB with {more} more",
            flush=True,
        )

    def images(self) -> None:
        """Measure the peak memory of large bodies that are in flight at once."""
        work = Work(0, "", "", instruction("answer", 1024, ANSWER_MS), image_bytes=BODY_BYTES)
        with Candidates(self.directory) as candidates:
            gateway = candidates.start(GATEWAY)
            warm(gateway, self.load)
            before = gateway.memory[0]
            reset_peak(gateway.pid)
            self.load.run(at(gateway, replace(work, clients=BODIES, requests=BODY_REQUESTS)))
            most, kept = peak(gateway.pid) - before, gateway.memory[0] - before
        name = f"memory of {BODIES} bodies of {BODY_BYTES / 1e6:.0f} MB"
        self.figures.at_most(f"{name}, at most, bodies each", [most / BODIES / BODY_BYTES], 3)
        self.figures.at_most(f"{name}, kept afterwards, bodies each", [kept / BODIES / BODY_BYTES], None)
        print(f"images: {before / 1e6:.1f} MB, {most / 1e6:.1f} MB more at most, {kept / 1e6:.1f} MB kept", flush=True)

    def ledger(self) -> None:
        """Compare the gateway with and without its ledger."""
        gateway_ledger.measure(self.directory, self.load, self.figures, self.rounds)

    def limits(self) -> None:
        """Compare the gateway with and without limits and a thousand stored keys."""
        gateway_limits.measure(self.directory, self.load, self.figures, self.rounds)

    def engine(self) -> None:
        """Compare the tokens of a real engine, directly and through the gateway that started it.

        The target applies with the model on a core of its own, where it is fastest. With a thread on each of two cores
        these threads wait for each other and for other processes, so everything that runs beside them counts twice.
        """
        alone = self._turns("on a core of its own", ["--core", "0"])
        shared = self._turns("on all cores")
        self.figures.at_least("real engine, tokens/s through the gateway of direct", alone, 0.97)
        self.figures.at_most("the same, engine, gateway and clients on all cores", shared, None)

    def _turns(self, where: str, options: Sequence[str] = ()) -> list[float]:
        engine, port = free_port(), free_port()
        command = [sys.executable, "-m", "bench.gateway_server", "up", str(engine), *options]
        environment = {"API_KEY": KEY, ENGINE_KEY: UPSTREAM_KEY, "SERVICE_PORT": str(port)}
        environment |= {"XDG_STATE_HOME": str(self.directory)}
        direct = Work(engine, UPSTREAM_KEY, MODEL, "Hello!", stream=True, clients=STREAMS, requests=GENERATIONS)
        direct = replace(direct, extra={"max_tokens": TOKENS, "ignore_eos": True, "temperature": 0})
        ways = {"direct": direct, "gateway": replace(direct, port=port, key=KEY)}
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        log = self.directory / "up.log"
        with running("up", command, log, f"http://127.0.0.1:{port}/health", **environment) as pid:
            leave_core_to_engine(pid)
            for work in ways.values():
                self.load.run(work)
            for number in range(self.rounds):
                for name in list(ways)[:: -1 if number % 2 else 1]:
                    done = self.load.run(ways[name])
                    speeds[name].append(done.requests * TOKENS / done.seconds)
                latest = ", ".join(f"{name} {found[-1]:.0f}" for name, found in speeds.items())
                print(f"engine {where}, turn {number + 1}: {latest} tokens/s", flush=True)
        for name, found in speeds.items():
            self.figures.series(f"engine {where}, {name}: tokens/s", found)
        return [ours / plain for ours, plain in zip(speeds["gateway"], speeds["direct"], strict=True)]


PARTS: dict[str, Callable[[Bench], None]] = {
    "proxies": Bench.proxies,
    "idle": Bench.idle,
    "images": Bench.images,
    "ledger": Bench.ledger,
    "limits": Bench.limits,
    "engine": Bench.engine,
}


def main() -> int:
    """Measure, print the figures and save them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved runs of each")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts; does not save results")
    arguments = parser.parse_args()
    figures, began = Figures(), time.monotonic()
    try:
        with signals_interrupt(), TemporaryDirectory(prefix="bench-gateway-") as name, Load.started() as load:
            bench = Bench(load, figures, Path(name), arguments.rounds)
            for part in arguments.only:
                PARTS[part](bench)
    except KeyboardInterrupt:
        return 130
    print(f"{time.monotonic() - began:.0f} s on {os.cpu_count()} cores\n")
    return figures.finish(keep=set(arguments.only) == set(PARTS))


if __name__ == "__main__":
    sys.exit(main())
