"""Which of an entry's flags an engine leaves out on another GPU than the entry's."""

from __future__ import annotations

import json

import pytest

from service.in_engine.vllm_service import gpu_flags

ARGV = ["--model", "/w", "--kv-cache-dtype", "fp8", "--moe-backend", "flashinfer_cutlass", "--seed", "1"]
BOUNDS = json.dumps({"--kv-cache-dtype": [[9, 0], [99, 0]], "--moe-backend": [[9, 0], [10, 0]]})


@pytest.mark.parametrize(
    ("capability", "left_out"),
    [
        ((9, 0), []),
        ((8, 0), ["--kv-cache-dtype", "fp8", "--moe-backend", "flashinfer_cutlass"]),
        ((8, 9), ["--kv-cache-dtype", "fp8", "--moe-backend", "flashinfer_cutlass"]),
        ((10, 0), ["--moe-backend", "flashinfer_cutlass"]),
        ((10, 3), ["--moe-backend", "flashinfer_cutlass"]),
        ((12, 0), ["--moe-backend", "flashinfer_cutlass"]),
    ],
)
def test_flags_chosen_for_another_gpu_are_left_out(capability: tuple[int, int], left_out: list[str]) -> None:
    """VLLM ends where a GPU has no such kernel; without the flag it chooses one."""
    kept = gpu_flags.supported(ARGV, BOUNDS, capability)

    assert kept == [part for part in ARGV if part not in left_out]


def test_flags_of_the_users_own_arguments_stay() -> None:
    """Of two equal flags the first is that of the entry's field; what extra_args say counts on every GPU."""
    kept = gpu_flags.supported([*ARGV, "--moe-backend", "triton"], BOUNDS, (8, 9))

    assert kept == ["--model", "/w", "--seed", "1", "--moe-backend", "triton"]


def test_engine_without_bounds_keeps_every_flag() -> None:
    """Entries without such fields have none."""
    assert gpu_flags.supported(ARGV, "", (7, 5)) == ARGV
