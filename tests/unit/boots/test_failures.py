"""Recorded boots that cannot work: which they are, for which boots a record holds, and for how long."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest

from service.boots import failures
from service.boots.failures import BootFailure, FailureFile, file_name, is_permanent
from service.engine.log import EngineLog
from service.errors import (
    DiskSpaceError,
    EngineError,
    EngineTimeoutError,
    GatedModelError,
    GpuCountError,
    HubUnreachableError,
    RecordedFailureError,
    ServiceError,
    UsageError,
)
from service.registry.gpus import find_gpu


def ended(*lines: str, code: int = 1, ready_after_s: float | None = None, out_of_memory: bool = False) -> EngineError:
    """Return the error of an engine whose log has these lines."""
    log = EngineLog()
    for line in lines:
        log.add(line)
    return log.describe_exit(code, 40.0, ready_after_s, out_of_memory=out_of_memory)


def raised(text: str) -> EngineError:
    """Return the error of an engine that ended with an exception."""
    return ended("Traceback (most recent call last):", '  File "x.py", line 1, in run', text)


@pytest.mark.parametrize(
    "error",
    [
        raised("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."),
        raised("ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`."),
        raised("ValueError: To serve at least one request (4.00 GiB KV cache is needed, which is larger than 1 GiB)."),
        ended("vllm serve: error: unrecognized arguments: --no-such-flag", code=2),
        ended("vllm serve: error: argument --dtype: invalid choice: 'x'", code=2),
        raised("ValueError: Model architectures ['X'] are not supported for now."),
        raised("RuntimeError: CUDA error: no kernel image is available for execution on the device"),
        raised("NotImplementedError: no attention backend for this head size"),
        ended("(EngineCore pid=1) killed", "engine core exited unexpectedly", out_of_memory=True),
        GatedModelError("gated"),
        GpuCountError("two"),
        UsageError("wrong"),
    ],
    ids=str,
)
def test_failure_that_the_same_boot_has_again_is_permanent(error: ServiceError) -> None:
    """Memory, flags, licences, and what the build or the GPU does not support."""
    assert is_permanent(error)


@pytest.mark.parametrize(
    "error",
    [
        ended("Killed", code=-9),
        raised("OSError: [Errno 98] Address already in use"),
        raised("OSError: [Errno 28] No space left on device"),
        EngineTimeoutError("not ready, unrecognized arguments"),
        HubUnreachableError("away"),
        DiskSpaceError("full"),
        KeyboardInterrupt("preempted"),
        RecordedFailureError("CUDA out of memory"),
    ],
    ids=str,
)
def test_failure_that_may_pass_is_not_permanent(error: BaseException) -> None:
    """A signal, a full disk, a hub that is away, a boot that took too long; and a record is not renewed."""
    assert not is_permanent(error)


def test_memory_that_others_share_may_be_free_later() -> None:
    """On this machine other engines, and other programs, take memory too."""
    assert not is_permanent(raised("torch.OutOfMemoryError: CUDA out of memory."), memory_is_its_own=False)
    flag = ended("vllm serve: error: unrecognized arguments: --x", code=2)
    assert is_permanent(flag, memory_is_its_own=False)


def test_record_refuses_the_same_boot_only(tmp_path: Path) -> None:
    """The same GPU, image, model and arguments; where the GPU was not known yet, any GPU."""
    path = tmp_path / file_name("vllm-l4", "org/m")
    file = FailureFile(path, lambda: "a")
    file.check("NVIDIA L4")
    file.save("m", "NVIDIA L4", EngineError("CUDA out of memory.", hint="Choose a larger GPU."))
    assert path.name == "org%2Fm.json"
    with pytest.raises(RecordedFailureError, match=r"memory\. Choose a larger GPU\. A boot found that 0 min"):
        file.check("NVIDIA L4")
    file.check("NVIDIA H200")
    file.check()
    FailureFile(path, lambda: "b").check("NVIDIA L4")
    file.save("m", "", GatedModelError("gated"))
    for gpu in ("", "NVIDIA L4"):
        with pytest.raises(RecordedFailureError, match="gated"):
            file.check(gpu)
    file.clear()
    file.clear()
    file.check("NVIDIA L4")


def test_record_expires_after_an_hour_and_a_damaged_one_holds_for_nothing() -> None:
    """Neither ever keeps a model from booting."""
    failure = BootFailure(at=time.time() - failures.EXPIRY_S + 60, model="m", gpu="", boot="a", reason="No.")
    assert BootFailure.parse(msgspec.json.encode(failure)) == failure
    assert "59 minutes ago" in failure.sentence
    expired = BootFailure(at=time.time() - failures.EXPIRY_S - 1, model="m", gpu="", boot="a", reason="No.")
    assert BootFailure.parse(msgspec.json.encode(expired)) is None
    for text in (b"", b"{}", b"[" * 2000, b'{"at": "x"}'):
        assert BootFailure.parse(text) is None


@pytest.mark.parametrize(
    ("gpu", "label", "same"),
    [
        ("H100", "NVIDIA H100 80GB HBM3", True),
        ("H100", "NVIDIA H200", True),
        ("H100!", "NVIDIA H200", False),
        ("H200", "2 x NVIDIA H200", True),
        ("L4", "NVIDIA L40S", False),
        ("A100-80GB", "NVIDIA A100-SXM4-80GB", True),
        ("A100-80GB", "NVIDIA A100-SXM4-40GB", False),
        ("A10", "NVIDIA A10G", True),
        ("A10", "NVIDIA A100-SXM4-80GB", False),
        ("RTX-PRO-6000", "NVIDIA RTX PRO 6000 Blackwell Server Edition", True),
        ("B200+", "NVIDIA B200", True),
        ("L4", "", True),
        ("L4", "cpu", True),
    ],
)
def test_gpu_is_known_by_its_drivers_name(gpu: str, label: str, same: bool) -> None:
    """A record of another GPU says nothing of a tier; one without a GPU's name may be any's."""
    assert find_gpu(gpu).is_named_in(label) is same
