"""Modal volumes: the caches that outlive replicas, and where they are mounted.

In the container they are addressed as `~/.cache/...`, which is where the programs that fill them look by themselves.
"""

from __future__ import annotations

from pathlib import PurePosixPath

import modal

HUB_CACHE = "/root/.cache/huggingface"
MOUNTS = {
    HUB_CACHE: "huggingface-cache",
    "/root/.cache/vllm": "vllm-cache",
    "/root/.cache/flashinfer": "flashinfer-cache",
}


def volumes() -> dict[str | PurePosixPath, modal.Volume]:
    """Return mount path -> volume, created at the first deploy."""
    return {path: modal.Volume.from_name(name, create_if_missing=True, version=2) for path, name in MOUNTS.items()}
