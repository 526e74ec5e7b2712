"""Faults under load against the service with the real engine. `python -m bench.chaos --help`."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from itertools import islice

from bench.chaos.run import faults
from bench.chaos.series import add_figures, run_all
from bench.report import Report

_KEPT = 40  # as many faults make a result


def main() -> int:
    """Run the faults; return 1 when something was violated."""
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=1000, help="how many")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no fault begins after so many")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="the same seed gives the same faults")
    parser.add_argument("--sites", type=int, default=1, help="services that they are divided among")
    parser.add_argument("--short", action="store_true", help="without the kinds that take longest")
    parser.add_argument("--only", type=int, help="the number of the only fault to run")
    parser.add_argument("--kind", default="", help="only faults whose kind has these words")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # after it has cleaned up
    number = max(arguments.faults, (arguments.only or 0) + 1)
    chosen = [
        fault
        for fault in islice(faults(arguments.seed, long=not arguments.short), number)
        if arguments.only in (None, fault.number) and arguments.kind in fault.kind.name
    ]
    began = time.monotonic()
    episodes, left = asyncio.run(
        run_all(chosen, short=arguments.short, seconds=arguments.seconds, sites=arguments.sites)
    )
    report = Report("chaos")
    add_figures(report, episodes, left, time.monotonic() - began)
    return report.finish(keep=len(episodes) >= _KEPT and not arguments.kind)


if __name__ == "__main__":
    sys.exit(main())
