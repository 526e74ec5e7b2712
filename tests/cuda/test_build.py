"""The kernels that vLLM would choose are in its CUDA build, for the GPUs on which it would choose them."""

from __future__ import annotations

import json
import os
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from service.registry.gpus import GPUS

from .architectures import compiled_for, runs_on
from .test_choices import CHOICES

# What a choice needs, by a word in its name: an operation of a library of vLLM's, or a module whose code is compiled on
# the GPU (FlashInfer, Triton, DeepGEMM, Humming). The first word that a name has is the one.
NEEDS = {
    "TRITON": ("triton",),
    "DeepGEMM": ("flashinfer", "vllm.third_party.deep_gemm"),
    "DeepGemm": ("vllm.third_party.deep_gemm",),
    "DEEPGEMM": ("vllm.third_party.deep_gemm",),
    "FlashInfer": ("flashinfer",),
    "FLASHINFER": ("flashinfer",),
    "Humming": ("humming",),
    "Cutlass": ("_C::cutlass_scaled_mm",),
    "MoEMethod MARLIN": ("_moe_C::moe_wna16_marlin_gemm",),
    "Marlin": ("_C::marlin_gemm",),
    "Unquantized": ("torch",),
    "TORCH_SDPA": ("torch",),
}
HOPPER = (9, 0)
FLASH_ATTENTION = {True: "_vllm_fa3_C::fwd", False: "_vllm_fa2_C::varlen_fwd"}  # whether the GPU is Hopper's
LIBRARIES = {
    "_C": "_C_stable_libtorch",
    "_moe_C": "_moe_C_stable_libtorch",
    "_vllm_fa2_C": "vllm_flash_attn/_vllm_fa2_C",
    "_vllm_fa3_C": "vllm_flash_attn/_vllm_fa3_C",
}
LOOK = """
import importlib, importlib.util, json, sys, torch, vllm
libraries, needed = json.loads(sys.argv[1])
for name in libraries:
    importlib.import_module("vllm." + name.replace("/", "."))
there = set(torch._C._dispatch_get_all_op_names())
missing = [name for name in needed if not (name in there if "::" in name else importlib.util.find_spec(name))]
print(json.dumps({"missing": missing, "at": vllm.__path__[0]}))
"""


def needs(name: str, capability: tuple[int, int]) -> tuple[str, ...]:
    """Return what a choice needs on a GPU."""
    if name.endswith("FLASH_ATTN"):
        return (FLASH_ATTENTION[capability == HOPPER], *(["triton"] if "TRITON" in name else []))
    found = next((needed for word, needed in NEEDS.items() if word in name), None)
    assert found, f"what does {name} need?"
    return found


def needed() -> Iterator[tuple[str, tuple[int, int]]]:
    """Find what all choices need, with the compute capability of the GPU."""
    for gpu, entries in json.loads(CHOICES.read_text()).items():
        capability = GPUS[gpu].compute_capability
        for chosen in entries.values():
            for names in chosen.values():
                yield from ((one, capability) for name in names for one in needs(name, capability))


def test_chosen_kernels_are_in_the_build_for_the_gpu(cuda_python: str, driver_stub: Path) -> None:
    """Operations are registered, modules are installed, and the libraries have code that the GPU can run."""
    capabilities = defaultdict(set)
    for name, capability in needed():
        capabilities[name].add(capability)
    assert set(FLASH_ATTENTION.values()) < capabilities.keys()
    question = json.dumps([[*LIBRARIES.values()], [*capabilities]])
    done = subprocess.run(
        [cuda_python, "-c", LOOK, question],
        env={**os.environ, "LD_LIBRARY_PATH": str(driver_stub), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["missing"] == []
    code = {space: compiled_for(Path(answer["at"]) / f"{file}.abi3.so") for space, file in LIBRARIES.items()}
    assert not runs_on(code["_vllm_fa3_C"], (8, 9)), "FlashAttention 3 is for Hopper alone"
    lacking = [
        (name, capability)
        for name, found in capabilities.items()
        for capability in found
        if "::" in name and not runs_on(code[name.partition("::")[0]], capability)
    ]
    assert lacking == []
