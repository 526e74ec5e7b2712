"""Boots that cannot work: recorded, so that none is paid for twice.

A file a model of an app has its last such boot. It holds for boots with the same GPU, image, model and arguments, for
an hour, until a deploy, or until `vllm-service deploy --retry`. An engine that was ready once is never recorded. Cheap
to import: it is imported while a replica starts.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import msgspec

from service.errors import (
    EngineError,
    EngineTimeoutError,
    GatedModelError,
    GpuCountError,
    RecordedFailureError,
    ServiceError,
    UnsupportedPlatformError,
    UsageError,
)
from service.files import atomic_write

DIRECTORY = "failures"  # within Modal's volume
EXPIRY_S = 3600.0
_LASTING = (UsageError, GatedModelError, GpuCountError, UnsupportedPlatformError)
# What the root cause of an engine's end says, where the same boot ends the same way again.
# Source: vLLM 0.32, `vllm/v1/core/kv_cache_utils.py`, `vllm/config/`, `vllm/platforms/`; PyTorch; argparse.
MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|KV cache is needed|KV cache memory|No available memory for the cache"
    r"|less than requested memory for kv|memory ran out|bad_alloc|MemoryError|memory allocation of"
)
_ARGUMENTS = re.compile(
    r"unrecognized arguments|error: argument |the following arguments|ambiguous option|validation errors? for"
    r"|max_model_len .* is greater than|reasoning parser|tool call parser|contains custom code"
    r"|(?i:unsupported)|not supported|n[o']t support|NotImplementedError|no kernel image|compute capability"
)


def is_permanent(error: BaseException, *, memory_is_its_own: bool = True) -> bool:
    """Tell whether a boot that failed so fails again.

    Args:
        error: With which it failed before it was ready.
        memory_is_its_own: No other engine takes memory of what it runs on.
    """
    if isinstance(error, _LASTING):
        return True
    if not isinstance(error, EngineError) or isinstance(error, EngineTimeoutError):
        return False
    text = error.message  # a hint has words of other causes
    return bool(_ARGUMENTS.search(text) or (memory_is_its_own and MEMORY.search(text)))


@dataclass(frozen=True, kw_only=True)
class BootFailure:
    """A boot that cannot work.

    Attributes:
        at: When it failed, in seconds since 1970.
        gpu: What it ran on, as boot records have it; empty: it failed before that was known.
        boot: Digest of the image, the model's entry and the arguments.
        reason: Why, and what to do.
    """

    at: float
    model: str
    gpu: str
    boot: str
    reason: str

    @classmethod
    def parse(cls, text: bytes) -> BootFailure | None:
        """Return the failure of a file; None: it is damaged, or expired."""
        try:
            found = _DECODER.decode(text)
        except (msgspec.DecodeError, RecursionError):
            return None
        return found if time.time() - found.at < EXPIRY_S else None

    @property
    def sentence(self) -> str:
        """Why no boot was begun."""
        minutes = max(0.0, time.time() - self.at) / 60
        return (
            f"{self.reason} A boot found that {minutes:.0f} minutes ago, so none was begun now. A changed deploy or "
            "'vllm-service deploy --retry' tries again, and so does a request an hour after it."
        )


def directory_of(app: str) -> str:
    """Return the path of an app's files within the volume."""
    return f"{DIRECTORY}/{quote(app, safe='')}"


def file_name(app: str, model: str) -> str:
    """Return the path of a model's file within the volume."""
    return f"{directory_of(app)}/{quote(model, safe='')}.json"


_DECODER = msgspec.json.Decoder(BootFailure)  # made before there are threads: see service/batch/store.py


class FailureFile:
    """The file of one model of an app, as its replicas use it.

    Args:
        file: Where it is.
        boot: Returns the digest of the image, the model's entry and the arguments.
    """

    def __init__(self, file: Path, boot: Callable[[], str]) -> None:
        self._file, self._boot = file, boot

    def check(self, gpu: str = "") -> None:
        """Refuse a boot that is known to fail.

        Args:
            gpu: What it runs on; empty while that is not known.

        Raises:
            RecordedFailureError: An earlier one with the same GPU, image, model and arguments did.
        """
        found = self._load()
        if found and found.gpu in {"", gpu} and found.boot == self._boot():
            raise RecordedFailureError(found.sentence)

    def save(self, model: str, gpu: str, error: ServiceError) -> None:
        """Record a boot that failed for good.

        Raises:
            OSError: It cannot be written.
        """
        failure = BootFailure(at=time.time(), model=model, gpu=gpu, boot=self._boot(), reason=str(error))
        atomic_write(self._file, msgspec.json.encode(failure))

    def clear(self) -> None:
        """Forget what was recorded: a boot worked."""
        with contextlib.suppress(OSError):
            self._file.unlink(missing_ok=True)

    def _load(self) -> BootFailure | None:
        try:
            return BootFailure.parse(self._file.read_bytes())
        except OSError:
            return None
