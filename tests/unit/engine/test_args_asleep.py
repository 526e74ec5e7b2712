"""What an engine is started with that will be put to sleep, and woken elsewhere."""

from __future__ import annotations

import pytest

from tests.unit.engine.test_args import command, value


@pytest.mark.parametrize("sleeps", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_command_gives_every_worker_our_words(device: str, sleeps: bool) -> None:
    """An engine that never sleeps renews its randomness too: a CPU snapshot keeps the seed."""
    argv = command("qwen3-8b", device=device, sleeps=sleeps).argv

    assert value(argv, "--worker-extension-cls") == "vllm_service.worker_extension.WorkerExtension"


def test_command_of_an_engine_that_sleeps_on_a_gpu_has_sleep_mode_and_maps_no_file() -> None:
    """Weights go to host memory and back; a mapped file would be open in the snapshot."""
    argv, before = command("qwen3-8b", sleeps=True).argv, command("qwen3-8b").argv

    assert [flag for flag in argv if flag not in before] == [
        *("--enable-sleep-mode", "--safetensors-load-strategy", "eager"),
    ]


def test_command_of_an_engine_that_sleeps_on_a_cpu_has_the_same_flags() -> None:
    """VLLM refuses sleep mode there; its scheduler sleeps without it."""
    assert command("tiny", device="cpu", sleeps=True).argv == command("tiny", device="cpu").argv


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_env_of_an_engine_that_sleeps_binds_it_to_no_machine(device: str) -> None:
    """No shared memory of NCCL's and no address of this network in a snapshot that wakes elsewhere."""
    bound = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "VLLM_HOST_IP": "127.0.0.1"}
    asleep = command("tiny", device=device, sleeps=True, parent_env={"VLLM_HOST_IP": "10.0.0.7"}).env
    awake = command("tiny", device=device).env

    assert {**awake, **bound} == asleep
    assert not set(bound) & set(awake)
