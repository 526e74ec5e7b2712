"""What vLLM's CUDA build does with every registry entry on every GPU that Modal offers and its weights fit on.

vLLM's own parser takes the command line, its own configuration accepts it, and building the model shows which attention
backends and kernels it chooses: `choices.json` has them. `python -m tests.cuda.test_choices` writes that file anew.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from service.engine.args import EngineOptions, engine_command
from service.in_engine.vllm_service import gpu_flags
from service.planning.fit import fit
from service.planning.models import planned_model
from service.registry import configs
from service.registry.gpus import GPUS
from service.registry.models import ModelSpec, Registry
from service.registry.tiers import Tier, tier_of

HERE = Path(__file__).parent
CHOICES = HERE / "choices.json"
TINY = HERE.parents[1] / "service" / "assets" / "tiny"
# Streaming multiprocessors of each GPU, by NVIDIA's data sheets; B200+ and H100! are what B200 and H100 are.
COMPUTE_UNITS = {
    "T4": 40,
    "L4": 58,
    "A10": 72,
    "L40S": 142,
    "A100-40GB": 108,
    "A100-80GB": 108,
    "RTX-PRO-6000": 188,
    "H100": 132,
    "H200": 132,
    "B200": 148,
    "B300": 148,
}
# Begin of a warning: why it is none of a flag that is ignored or slow.
EXPECTED_WARNINGS = {
    "Enforce eager set": "fast_boot asks for it",
    "Inductor compilation was disabled by user settings": "fast_boot asks for it",
    "Auto-initialization of reasoning token IDs failed": "the tiny model's tokenizer stands in for the model's own",
    "Forcing --disable_chunked_mm_input": "vLLM's own choice for Gemma 3's attention among an image's tokens",
    "FlashInfer GDN prefill is JIT-compiled": "vLLM's own choice; the first boot compiles it",
    "Auto-disabled DeepGemm": "vLLM's own choice on Blackwell",
    "Pooling models do not support full cudagraphs": "vLLM's own choice of graphs in pieces",
    "Whisper is known to have issues with forked workers": "one GPU needs no worker process; the CPU build forks",
    "Add ": "vLLM's own padding of its groups of layers, which plans count",
    "FA4": "vLLM's own choice of FlashAttention 2 for this head size on Blackwell",
    "Your device 'NVIDIA T4' (with compute capability 7.5) doesn't support torch.bfloat16": "float16 does on a T4",
    "Casting torch.bfloat16 to torch.float16": "float16 does on a T4",
    "Cannot use FA version 2": "a T4 has none",
}
# What vLLM refuses by a GPU's compute capability, and so the registry does, by `min_compute_capability`.
REFUSED = {("T4", "gpt-oss-20b"): "Minimum capability: 80. Current capability: 75."}


@pytest.mark.parametrize("gpu", COMPUTE_UNITS)
def test_every_entry_that_fits_is_accepted_and_runs_on_the_kernels_that_are_expected(
    gpu: str, cuda_python: str, driver_stub: Path, tmp_path: Path
) -> None:
    """No error, no warning of a flag that is ignored or slow, and the backends and kernels of `choices.json`."""
    answers = ask(gpu, cuda_python, driver_stub, tmp_path)
    refused = {key: answer.pop("error") for key, answer in answers.items() if "error" in answer}

    assert refused.keys() == {key for of, key in REFUSED if of == gpu}, "\n".join(refused.values())
    for key, error in refused.items():
        assert REFUSED[gpu, key] in error
    specs = Registry.load().specs
    assert not any(tier_of(specs[key], GPUS[gpu]).holds(specs[key]) for key in refused)
    assert all(tier_of(specs[key], GPUS[gpu]).holds(specs[key]) for key in answers.keys() - refused.keys())
    for key, answer in answers.items():
        if key not in refused:
            check_kv_cache(key, gpu, answer.pop("kv_cache"))
    warnings = {key: answer.pop("warnings") for key, answer in answers.items()}
    assert {key: left for key, lines in warnings.items() if (left := unexpected(lines))} == {}
    assert {key: answer for key, answer in answers.items() if key not in refused} == json.loads(CHOICES.read_text())[
        gpu
    ]


def check_kv_cache(key: str, gpu: str, measured: dict[str, int]) -> None:
    """Insist that `plan` counts what vLLM plans on one such GPU, within 3 %: of a request, and of all of 40 GB."""
    planned = planned_model(Registry.load().specs[key], offline=True)
    cache, length = fit(planned, Tier(GPUS[gpu]), fast_boot=True).cache, measured["max_model_len"]
    assert cache.request_bytes(length) == pytest.approx(measured["request_bytes"], rel=0.03), key
    assert cache.sequences(40e9, length) * length == pytest.approx(measured["tokens"], rel=0.03), key


def unexpected(lines: list[str]) -> list[str]:
    """Return the warnings that have no reason above."""
    return [line for line in lines if not line.startswith(tuple(EXPECTED_WARNINGS))]


def ask(gpu: str, python: str, driver_stub: Path, directory: Path) -> dict[str, dict[str, Any]]:
    """Return by model what vLLM answers to its distinct command lines on one claimed GPU, in one process."""
    cases, env = [], {}
    for spec in Registry.load().specs.values():
        tier = tier_of(spec, GPUS[gpu])
        # whether its compute capability is enough is vLLM's to tell
        if tier.holds(spec.model_copy(update={"min_compute_capability": None})):
            weights, draft = stand_in(spec.hub_id, directory), None
            if spec.speculative and spec.speculative.hub_id:
                draft = stand_in(spec.speculative.hub_id, directory)
            made, env = cases_of(spec, tier, weights, draft)
            cases += made
    done = subprocess.run(
        [python, str(HERE / "claimed_gpu.py"), json.dumps(claim_of(gpu))],
        input="".join(json.dumps(case) + "\n" for case in cases),
        # visible to no GPU, or Triton is off; as where NVIDIA's kernels of attention can be downloaded
        env=env | {"LD_LIBRARY_PATH": str(driver_stub), "CUDA_VISIBLE_DEVICES": "", "VLLM_HAS_FLASHINFER_CUBIN": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers: dict[str, dict[str, Any]] = {}
    for line in done.stdout.splitlines():
        answer = json.loads(line)
        merged = answers.setdefault(answer.pop("id"), {"warnings": []})
        merged["warnings"] += answer.pop("warnings")
        merged |= answer
    return answers


def claim_of(gpu: str) -> dict[str, Any]:
    """Return what `claimed_gpu.py` is told of a GPU."""
    return {
        "name": f"NVIDIA {gpu}",
        "capability": GPUS[gpu].compute_capability,
        "memory_gb": GPUS[gpu].memory_gb,
        "compute_units": COMPUTE_UNITS[gpu],
    }


def cases_of(
    spec: ModelSpec, tier: Tier, weights: Path, draft: Path | None
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return an entry's distinct command lines, the compiled one with the model built, and their environment."""
    cases = []
    for fast_boot, sleeps in ((True, False), (True, True), (False, True), (False, False)):
        options = EngineOptions(n_gpu=tier.n_gpu, fast_boot=fast_boot)
        command = engine_command(spec, weights, options, draft=draft, sleeps=sleeps, parent_env=os.environ)
        bounds = command.env.get(gpu_flags.VARIABLE, "")
        build = not fast_boot and not sleeps
        cases.append({"id": spec.key, "argv": command.argv, "bounds": bounds, "build": build})
    return cases, dict(command.env)


def stand_in(hub_id: str | None, directory: Path) -> Path:
    """Make a model directory with the real shape, a config.json, and the tiny model's tokenizer.

    A model that hears has a feature extractor as well, without which vLLM does not know how long a recording may be.
    """
    made = directory / (hub_id or "tiny").replace("/", "--")
    shutil.copytree(TINY, made, ignore=shutil.ignore_patterns("*.safetensors"))
    if hub_id:
        shutil.copy(configs.file_of(hub_id), made / "config.json")
        if mel_bins := json.loads((made / "config.json").read_text()).get("num_mel_bins"):
            extractor = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": mel_bins}
            (made / "preprocessor_config.json").write_text(json.dumps(extractor))
    return made


if __name__ == "__main__":  # arguments: interpreter of the CUDA environment, directory of the stub, an empty directory
    written: dict[str, Any] = {}
    for name in COMPUTE_UNITS:
        found = ask(name, sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]) / name)
        for key, one in found.items():
            one.pop("kv_cache", None)
            sys.stderr.write(f"{name} {key} {one.get('error', '')[-300:]} {unexpected(one.pop('warnings'))}\n")
        written[name] = {key: one for key, one in found.items() if "error" not in one}
    lines = json.dumps(written, indent=1, sort_keys=True) + "\n"
    CHOICES.write_text(re.sub(r"\[[^\]]*\]", lambda found: " ".join(found[0].split()), lines))
