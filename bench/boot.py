"""Boot times of every snapshot strategy and of plain vLLM: the tiny model, one machine, interleaved. `make bench-boot`.

For plain vLLM and `vllm-service up` the benchmark polls /health every 50 ms from the spawn of the process that a user
would start. A replica with a snapshot is timed from its release to its first token. It also measures the commands that
need no engine, the memory of the supervising process, and the processor time of watching an idle engine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from bench.processes import Timed, first_token, free_port, plain_vllm, service
from bench.report import Report
from service.engine import environment
from service.registry.models import Registry
from service.replica.compile_caches import Caches
from service.replica.lifecycle import Replica
from service.replica.plan import Plan
from tests.contract.memory import overwrite

SETTLED_S, WATCHED_S = 5.0, 60.0
WAKE_TIMEOUT_S = 3.0


def main() -> int:
    """Measure, print the figures and save them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved runs of each")
    arguments = parser.parse_args()
    bench = Bench()
    for number in range(1, arguments.rounds + 1):
        bench.round()
        print(f"round {number}: " + ", ".join(f"{name} {times[-1]:.2f}" for name, times in bench.times.items()))
    return bench.report()


class Bench:
    """The times of each way to boot, one per round."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}
        self.parent_mb: list[float] = []
        env = environment.ensure()
        spec = Registry.load().specs["tiny"]
        versions = environment.versions(env.device)
        caches = Caches(environment.compile_cache_dir(), versions, model=spec.key)
        self._plan = Plan(spec, spec.key, env.device, env.python, os.environ, versions=versions, caches=caches)

    def round(self) -> None:
        """Boot once in each way."""
        self._take("plain vLLM", Timed(lambda port: plain_vllm(self._plan.python, port)).boot())
        self._take("plain vLLM, 5 s poll", Timed(lambda port: plain_vllm(self._plan.python, port), poll_s=5).boot())
        self._take("off, command", Timed(service, look=self._weigh).boot())
        self._take("off", self._replica(snapshot="off"))
        self._take("cpu", self._replica(snapshot="cpu"))
        self._take("gpu", self._replica(snapshot="gpu"))
        self._take("gpu, wrong canary", self._replica(break_memory, snapshot="gpu"))
        hang = {"snapshot": "gpu", "wake_timeout_s": WAKE_TIMEOUT_S}
        self._take("gpu, hanging wake", self._replica(suspend_core, **hang))

    def report(self) -> int:
        """Print the table; return the exit code."""
        report = Report("boot")
        for name, times in self.times.items():
            report.sample(name, times)
        plain, off = self.times["plain vLLM"], self.times["off"]

        def ratio(name: str, target: float) -> None:
            ratios = [mine / theirs for mine, theirs in zip(self.times[name], plain, strict=True)]
            report.add(f"{name} / plain vLLM, median ratio", statistics.median(ratios), target)

        ratio("off, command", 0.70)
        ratio("cpu", 0.30)
        ratio("gpu", 0.05)
        for name, timeout_s in (("gpu, wrong canary", 0.0), ("gpu, hanging wake", WAKE_TIMEOUT_S)):
            ratios = [(time - timeout_s) / cold for time, cold in zip(self.times[name], off, strict=True)]
            report.add(f"({name} - its time-out) / off, median ratio", statistics.median(ratios), 1.10)
        report.add("memory of the supervising process", max(self.parent_mb), 120, "MB")
        report.add("watching an idle engine, above plain vLLM, of one core", self._watching() * 100, 0.5, "%")
        bin_directory = Path(sys.executable).parent
        report.add("vllm-service --help", _median([str(bin_directory / "vllm-service"), "--help"]), 0.35, "s")
        report.add(
            "python -c 'import service.server'", _median([sys.executable, "-c", "import service.server"]), 1.0, "s"
        )
        return report.finish()

    def _take(self, name: str, seconds: float) -> None:
        self.times.setdefault(name, []).append(seconds)

    def _weigh(self, pid: int) -> None:
        self.parent_mb.append(psutil.Process(pid).memory_info().rss / 1e6)

    def _replica(self, meanwhile: Callable[[Replica], None] = lambda _: None, **changes: Any) -> float:
        """Return the seconds from the release (from the spawn without a snapshot) to the first token."""
        replica = Replica(replace(self._plan, port=free_port(), **changes))
        with closing(_Stopping(replica)):
            replica.prepare()
            meanwhile(replica)
            began = time.monotonic()
            replica.start(restored=replica.plan.snapshot != "off")  # its timeline begins here, as after a restore
            first_token(replica.plan.port)
            return time.monotonic() - began

    def _watching(self) -> float:
        """Return the share of a core that watching an idle engine takes: supervisor, heartbeat and probes.

        That is what supervisor and engine take above what plain vLLM takes, both without the threads of gloo, which
        turn by themselves, in another number in each.
        """
        plain = _idle_share(lambda port: plain_vllm(self._plan.python, port))
        return max(0.0, _idle_share(service) - plain)


def _idle_share(command: Callable[[int], list[str]]) -> float:
    shares: list[float] = []

    def spent(pid: int) -> float:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        return sum(_cpu_s(process.pid, thread.id) for process in family for thread in process.threads())

    def watch(pid: int) -> None:
        time.sleep(SETTLED_S)
        before, began = spent(pid), time.monotonic()
        time.sleep(WATCHED_S)
        shares.append((spent(pid) - before) / (time.monotonic() - began))

    Timed(command, look=watch).boot()
    return shares[0]


def _cpu_s(pid: int, thread: int) -> float:
    """Return the processor time of a thread so far; 0 for a thread of gloo."""
    name, _, rest = Path(f"/proc/{pid}/task/{thread}/stat").read_text().rpartition(")")
    user, system = rest.split()[11:13]
    return 0.0 if "gloo" in name else (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


class _Stopping:
    """Stops a replica; for `closing`."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def close(self) -> None:
        self._replica.stop(0)


def break_memory(replica: Replica) -> None:
    """Overwrite a weight of the sleeping engine, as a broken restore would."""
    model = replica.plan.spec.directory
    assert model is not None  # noqa: S101 - the tiny model is a directory
    with (model / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        begin, end = header["model.norm.weight"]["data_offsets"]
        file.seek(begin, os.SEEK_CUR)
        weight = file.read(end - begin)
    leader = psutil.Process(replica.engine.pid)
    if not sum(overwrite(process.pid, weight, bytes(len(weight))) for process in leader.children(recursive=True)):
        raise SystemExit("the weight was not found in the engine's memory")


def suspend_core(replica: Replica) -> None:
    """Suspend the engine's processes, so that the wake hangs."""
    for process in psutil.Process(replica.engine.pid).children(recursive=True):
        process.suspend()


def _median(argv: list[str], runs: int = 7) -> float:
    times = []
    for _ in range(runs):
        began = time.monotonic()
        subprocess.run(argv, stdout=subprocess.DEVNULL, check=True)
        times.append(time.monotonic() - began)
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
