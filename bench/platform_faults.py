"""1,000 requests to a Modal whose proxy answers 429, 408, redirect loops, 502 and resets at random.

The gateway, the tier and its engine are deployed to the tests' control plane, and its proxy fails before the tier:
`tests/contract/faulty_requests.py`. A client that got an error waits as long as it says. Each round begins with a cold
pool. Run by `make bench-platform`; `--seed` repeats a run.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.report import Report
from tests.contract.conftest import runtime_with_engine
from tests.contract.faulty_requests import faulty_service, run
from tests.fakes.modal.faults import Faults
from tests.unit.gateway.test_error_docs import table

REQUESTS, ROUNDS, AT_ONCE, SHARE = 1000, 5, 50, 0.3
LIMIT_S = 130.0  # 120 s of SERVICE_HOLD_S, and the redirects of a request


def main() -> int:
    """Send the requests; return 1 when a client or an engine got what it must not."""
    parser = argparse.ArgumentParser(prog="python -m bench.platform_faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the faults")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="how many")
    arguments = parser.parse_args()
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # connections that the proxy breaks off
    with TemporaryDirectory() as name:
        directory = Path(name)
        runtime, faults = runtime_with_engine(directory / "client"), Faults(arguments.seed, SHARE)
        with faulty_service(directory, runtime, faults) as (plane, url):
            done = run(plane, url, requests=arguments.requests, rounds=ROUNDS, at_once=AT_ONCE, seed=arguments.seed)
    documented = {code for _, _, codes in table().values() for code in codes}
    report = Report("platform")
    report.add("requests", sum(done.codes.values()))
    report.add("faults of the platform", len(faults.drawn))
    wrong = sum(count for code, count in done.codes.items() if code not in documented | {"answered"})
    report.add("neither an answer nor a documented error", wrong, 0)
    report.add("requests that reached an engine", len(done.reached))
    report.add("requests that reached an engine twice", sum(times > 1 for times in done.reached.values()), 0)
    report.add("cold periods of the pool", len(done.boots))
    report.add("containers started in a cold period, most", max(done.boots), 1)
    report.add("requests waiting at Modal in a cold period, most", done.most_queued_cold, 1)
    report.add("slowest request", max(done.seconds), LIMIT_S, "s")
    for outcome, count in done.wakes.items():
        report.add(f"wakes: {outcome}", count)
    for code, count in sorted(done.codes.items()):
        report.add(f"clients: {code}", count)
    return report.finish(keep=arguments.requests >= REQUESTS)


if __name__ == "__main__":
    sys.exit(main())
