"""Sleep and wake on a GPU: random weights of Qwen3-8B's shape, eager and compiled. `make bench-gpu`, no network.

Needs an NVIDIA GPU with 24 GB or more. `--cpu` tests the script itself with a small shape and saves no result.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.processes import killed_with_us
from bench.report import Report

ROOT = Path(__file__).parents[1]
TINY = ROOT / "service/assets/tiny"
# Source: config.json of Qwen/Qwen3-8B at b968826d9c46dd6066d109eabc6255188de91218
QWEN3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}


def main() -> int:
    """Measure both variants, print the figures and save them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", help="an interpreter that has vLLM; by default that of the engine's environment")
    parser.add_argument("--cycles", type=int, default=50, help="sleeps and wakes of each variant")
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()
    report = Report("gpu_boot")
    with TemporaryDirectory() as directory:
        _shape(Path(directory), {} if arguments.cpu else QWEN3_8B)
        for name, flags in (("eager", ["--eager"]), ("compiled", [])):
            on = ["--cpu"] if arguments.cpu else []
            _add(report, name, _engine(arguments, directory, [*flags, *on]), arguments.cycles)
    return report.finish(keep=not arguments.cpu)


def _shape(directory: Path, changes: dict[str, Any]) -> None:
    """Write a model directory without weights; vLLM initialises them at random."""
    for file in TINY.glob("*.json"):
        if not file.name.startswith("model."):
            shutil.copy(file, directory)
    config = json.loads((TINY / "config.json").read_text())
    layers = changes.get("num_hidden_layers", config["num_hidden_layers"])
    config |= {**changes, "layer_types": ["full_attention"] * layers, "max_window_layers": layers}
    (directory / "config.json").write_text(json.dumps(config))


def _engine(arguments: argparse.Namespace, model: str, flags: list[str]) -> dict[str, Any]:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'service/in_engine'}", "VLLM_NO_USAGE_STATS": "1"}
    command = [arguments.python or _engine_python(arguments.cpu), "-m", "bench.gpu_engine", model, *flags]
    command += ["--cycles", str(arguments.cycles), "--spawned-at", str(time.monotonic())]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=pipe, text=True, start_new_session=True)
    with process, killed_with_us(process.pid):
        try:
            output, _ = process.communicate()
        finally:
            process.kill()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return dict(json.loads(output.splitlines()[-1]))


def _engine_python(cpu: bool) -> str:
    from service.engine import environment  # noqa: PLC0415 - with --python the engine's environment need not exist

    return environment.ensure("cpu" if cpu else "cuda").python


def _add(report: Report, name: str, facts: dict[str, Any], cycles: int) -> None:
    report.versions |= {"vllm": facts["vllm"], "torch": facts["torch"]}
    for figure in ("import_s", "build_s", "sleep_s", "wake_s", "wake_slowest_s"):
        report.add(f"{name}: {figure.removesuffix('_s').replace('_', ' ')}", facts[figure], unit="s")
    report.add(f"{name}: GPU memory awake", facts["used_awake_gib"], unit="GiB")
    report.add(f"{name}: GPU memory asleep", facts.get("used_asleep_gib", 0.0), unit="GiB")
    report.add(f"{name}: canaries that differ, of {cycles} wakes", len(facts["different"]), 0)
    report.add(f"{name}: before the sleeps", facts["tokens_per_s_before"], unit="tokens/s")
    report.add(f"{name}: after, as a share of before", facts["tokens_per_s_after"] / facts["tokens_per_s_before"])
    for difference in facts["different"]:
        print(difference)


if __name__ == "__main__":
    sys.exit(main())
