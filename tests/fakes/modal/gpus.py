"""What a container sees of its GPU: an `nvidia-smi` first on its PATH that tells what Modal would have attached.

During the hooks before a CPU snapshot no GPU is visible; from the restore on it is. No CUDA, no NVML.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .sandbox import Task

_SCRIPT = """#!/bin/sh
gpus="$(dirname "$0")/gpus"
if [ ! -s "$gpus" ]; then
    echo "No devices were found" >&2
    exit 6
fi
cat "$gpus"
"""


def lay_out_gpus(task: Task) -> Path:
    """Write the container's `nvidia-smi`, which lists one `GPU <n>: <type>` line for each; return its directory."""
    directory = task.work / "bin"
    directory.mkdir()
    script = directory / "nvidia-smi"
    script.write_text(_SCRIPT)
    script.chmod(0o755)
    sees_gpus_early = task.definition._experimental_enable_gpu_snapshot or not task.is_snapshotting
    if sees_gpus_early:
        attach_gpus(task)
    return directory


def attach_gpus(task: Task) -> None:
    """Let the container see its GPUs."""
    config = task.definition.resources.gpu_config
    count = (config.count or 1) if config.gpu_type else 0
    lines = [f"GPU {index}: {config.gpu_type} (UUID: GPU-{index})\n" for index in range(count)]
    (task.work / "bin" / "gpus").write_text("".join(lines))
