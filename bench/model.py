"""A small real model, served here and by vLLM's own server: how soon it is ready, and how fast it answers.

SmolLM2-135M-Instruct, one machine without a GPU, interleaved, each server started as a user starts it: this service by
`vllm-service up`, through its gateway; vLLM by its own command with a KV cache of 2 GiB (by default it wants 92 % of
the memory, and ends where it is not free), with `--enforce-eager` too, and with all settings that this service has.
Measured by vLLM's own benchmark, with one stream and with eight, with prompts that no earlier one begins like. `make
bench-model`.

With `--reasons` it starts vLLM with the settings of this service, and again without each of them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.processes import free_port, running, wait_healthy
from bench.report import Report
from service.benchmarks import prompts, vllm_bench
from service.benchmarks.report import RequestRecord
from service.engine import environment
from service.engine.args import engine_command
from service.engine.model_files import ModelFiles
from service.registry.models import Registry
from tests.clients import client_env

MODEL = "smollm2"
INPUT_TOKENS, OUTPUT_TOKENS = 128, 64
_TOKENS_PER_WORD = 1.22  # of these prompts, by the model's tokenizer, the chat template not counted
STREAMS = {1: 8, 8: 32}  # requests of a measurement, by how many there are at once
_PORT = "{port}"
_PLAIN_KV_CACHE = 2 * 1024**3
_ENTRY = "vllm.entrypoints.launchers.api_server.entry"  # what `vllm serve` runs; the CPU build lacks the command
# Flags and variables of an engine that only this service's own code in it understands, or that concern others.
_OWN_FLAGS = {"--middleware", "--worker-extension-cls", "--served-model-name", "--host", "--port"}
_OWN_VARIABLES = {"PYTHONPATH", "VLLM_PLUGINS", "VLLM_MEDIA_CONNECTOR"}
SERVICE, PLAIN, EAGER, SETTINGS = "service", "plain vLLM", "plain vLLM, eager", "plain vLLM, our settings"
_REASONS = {  # setting that is taken away -> its flags and variables
    "one process": ("--distributed-executor-backend", "VLLM_ENABLE_V1_MULTIPROCESSING"),
    "threads that leave a core and spin little": ("OMP_NUM_THREADS", "GOMP_SPINCOUNT"),
    "no compilation": ("--enforce-eager", "TORCHDYNAMO_DISABLE"),
    "a KV cache of 18 sequences of 2,048 tokens": ("--kv-cache-memory-bytes",),
    "at most 18 sequences": ("--max-num-seqs",),
    "2,048 tokens a step": ("--max-num-batched-tokens",),
    "a context of 8,192": ("--max-model-len",),
}


@dataclass(frozen=True)
class Server:
    """How a server is started: its command, with a word for the port, and variables beside those of this process."""

    argv: Sequence[str]
    env: Mapping[str, str]
    model: str


@dataclass(frozen=True)
class Figures:
    """What one run of a server gave.

    Attributes:
        ready_s: From its spawn to the first 200 of /health.
        output_per_s: Output tokens a second, by the number of streams.
        ttft_s: Median time to the first token of one stream.
        input_tokens: Median length of a prompt.
    """

    ready_s: float
    output_per_s: Mapping[int, float]
    ttft_s: float
    input_tokens: float

    def __str__(self) -> str:
        """Return the line that is printed."""
        rates = ", ".join(f"{rate:.0f} tokens/s of {streams}" for streams, rate in self.output_per_s.items())
        return f"ready {self.ready_s:5.1f} s, {rates}, TTFT {self.ttft_s * 1e3:.0f} ms"


def main() -> int:
    """Measure, print the figures and save them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved runs of each server")
    parser.add_argument("--reasons", action="store_true", help="vLLM without each setting of this service instead")
    arguments = parser.parse_args()
    python, directory = environment.ensure().python, client_env.smollm2()
    with tempfile.TemporaryDirectory() as files:
        found = servers(python, directory, Path(files))
        chosen = without_each(found[SETTINGS]) if arguments.reasons else found
        results: dict[str, list[Figures]] = {name: [] for name in chosen}
        for number in range(arguments.rounds):
            for name, server in chosen.items():
                results[name].append(measure(python, server, seed=number))
                print(f"round {number + 1}, {name:<45} {results[name][-1]}", flush=True)
    return _reasons(results) if arguments.reasons else _compare(results)


def servers(python: str, directory: Path, files: Path) -> dict[str, Server]:
    """Return every way to serve the model.

    Args:
        python: Of the engine's environment.
        directory: The model's.
        files: Where the models file of this service is written.
    """
    models = files / "models.toml"
    models.write_text(f'[models.{MODEL}]\npath = "{directory}"\n')
    up = [str(Path(sys.executable).parent / "vllm-service"), "up", MODEL]
    plain = [python, "-m", _ENTRY, "--model", str(directory), "--host", "127.0.0.1", "--port", _PORT]
    usual = [*plain, "--kv-cache-memory-bytes", str(_PLAIN_KV_CACHE)]
    spec = Registry.load(models).specs[MODEL]
    command = engine_command(spec, directory, files=ModelFiles.read(directory), device="cpu")
    flags = _without(command.argv, _OWN_FLAGS | {"--model"})
    env = {name: value for name, value in command.env.items() if name not in _OWN_VARIABLES}
    return {
        SERVICE: Server(up, {"SERVICE_MODELS_FILE": str(models)}, MODEL),
        PLAIN: Server(usual, {}, str(directory)),
        EAGER: Server([*usual, "--enforce-eager"], {}, str(directory)),
        SETTINGS: Server([*plain, *flags], env, str(directory)),
    }


def without_each(server: Server) -> dict[str, Server]:
    """Return the server, and it without each setting, whose flags and variables are as vLLM has them then."""
    found = {"all settings": server}
    for reason, names in _REASONS.items():
        env = {name: value for name, value in server.env.items() if name not in names}
        found[f"without {reason}"] = Server(_without(server.argv, set(names)), env, server.model)
    return found


def measure(python: str, server: Server, seed: int) -> Figures:
    """Start a server, measure it, and end it."""
    port = free_port()
    argv = [str(port) if word == _PORT else word for word in server.argv]
    began = time.monotonic()
    with running(argv, 15, SERVICE_PORT=str(port), **server.env) as process:
        wait_healthy(process, port)
        ready_s = time.monotonic() - began
        found = {streams: _answers(python, server, port, streams, seed) for streams in STREAMS}
    rates = {streams: _rate(records) for streams, records in found.items()}
    alone = found[1]
    tokens = statistics.median(one.input_tokens for one in alone)
    return Figures(ready_s, rates, statistics.median(one.ttft_s for one in alone), tokens)


def _answers(python: str, server: Server, port: int, streams: int, seed: int) -> list[RequestRecord]:
    """Send requests after one that warms up; return what was measured of them."""
    texts = prompts.build(STREAMS[streams] + 1, INPUT_TOKENS, _TOKENS_PER_WORD, seed * 100 + streams)
    for part, concurrency in ((texts[:1], 1), (texts[1:], streams)):
        job = vllm_bench.Job(f"http://127.0.0.1:{port}", server.model, part, OUTPUT_TOKENS, concurrency)
        records = vllm_bench.run(python, job, "", lambda _: None)
        if failed := [one.error for one in records if one.error]:
            raise SystemExit(f"{len(failed)} of {len(records)} requests failed: {failed[0]}")
    return records


def _rate(records: Sequence[RequestRecord]) -> float:
    began = min(one.start_s for one in records)
    return sum(one.output_tokens for one in records) / (max(one.start_s + one.latency_s for one in records) - began)


def _without(argv: Sequence[str], names: set[str]) -> list[str]:
    """Return a command without some flags and what follows each up to the next flag."""
    kept, leaving = [], False
    for word in argv:
        leaving = word in names if word.startswith("--") else leaving
        kept += [] if leaving else [word]
    return kept


def _compare(results: Mapping[str, Sequence[Figures]]) -> int:
    report = Report("model")
    _samples(report, results)
    ours = results[SERVICE]

    for other, target in ((EAGER, 0.28), (PLAIN, 0.28), (SETTINGS, None)):
        ratios = [mine.ready_s / theirs.ready_s for mine, theirs in zip(ours, results[other], strict=True)]
        report.add(f"ready: service / {other}, median ratio", statistics.median(ratios), target)
    # the other's above ours, so that less is better, as in every target
    for streams in STREAMS:
        for other, target in ((EAGER, 1 / 1.3), (PLAIN, 1 / 1.3), (SETTINGS, 1.0)):
            pairs = zip(ours, results[other], strict=True)
            ratios = [theirs.output_per_s[streams] / mine.output_per_s[streams] for mine, theirs in pairs]
            report.add(f"tokens/s of {streams}: {other} / service", statistics.median(ratios), target)
    for other in (EAGER, PLAIN, SETTINGS):
        ratios = [mine.ttft_s / theirs.ttft_s for mine, theirs in zip(ours, results[other], strict=True)]
        report.add(f"TTFT: service / {other}, median ratio", statistics.median(ratios))
    report.add("load of the machine, average of 15 minutes", os.getloadavg()[2])
    return report.finish()


def _reasons(results: Mapping[str, Sequence[Figures]]) -> int:
    report = Report("model_reasons")
    _samples(report, results)
    whole = results["all settings"]
    for name, figures in results.items():
        if figures is whole:
            continue
        pairs = list(zip(figures, whole, strict=True))
        report.add(f"ready: {name} / with it", statistics.median(one.ready_s / all_.ready_s for one, all_ in pairs))
        for streams in STREAMS:
            ratios = [one.output_per_s[streams] / all_.output_per_s[streams] for one, all_ in pairs]
            report.add(f"tokens/s of {streams}: {name} / with it", statistics.median(ratios))
    report.add("load of the machine, average of 15 minutes", os.getloadavg()[2])
    return report.finish()


def _samples(report: Report, results: Mapping[str, Sequence[Figures]]) -> None:
    for name, figures in results.items():
        report.sample(f"{name}: ready, s", [one.ready_s for one in figures])
        report.sample(f"{name}: TTFT, s", [one.ttft_s for one in figures])
        report.sample(f"{name}: tokens of a prompt", [one.input_tokens for one in figures])
        for streams in STREAMS:
            report.sample(f"{name}: tokens/s of {streams}", [one.output_per_s[streams] for one in figures])


if __name__ == "__main__":
    sys.exit(main())
