"""What a container sees of its GPU: an `nvidia-smi` first on its PATH that tells what Modal would have attached.

During the hooks before a CPU snapshot no GPU is visible; from the restore on it is. No CUDA, no NVML.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .sandbox import Task

_QUERY = "--query-gpu=name,memory.total,driver_version,uuid --format=csv,noheader,nounits"
_SCRIPT = f"""#!/bin/sh
case "$*" in
    "") gpus="$(dirname "$0")/gpus" ;;
    "{_QUERY}") gpus="$(dirname "$0")/gpus.csv" ;;
    *) echo "this stand-in knows no arguments but {_QUERY}" >&2; exit 2 ;;
esac
if [ ! -s "$gpus" ]; then
    echo "No devices were found" >&2
    exit 6
fi
cat "$gpus"
"""


def lay_out_gpus(task: Task) -> Path:
    """Write the container's `nvidia-smi`; return its directory.

    Without arguments it lists a line `GPU <n>: <type>` for each GPU, and a row for each when asked for the fields of
    `_QUERY`; it refuses any others.
    """
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
    rows = [f"{config.gpu_type}, [N/A], 580.95.05, GPU-{index}\n" for index in range(count)]
    (task.work / "bin" / "gpus.csv").write_text("".join(rows))
    (task.work / "bin" / "gpus").write_text("".join(lines))
