"""Modal's volumes: the caches that outlive replicas, and where they are mounted.

They are mounted below `~/.cache/`, where huggingface_hub, vLLM and FlashInfer keep their caches by default.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import modal

from service.boots.records import DIRECTORY
from service.replica import compile_caches as replica_compile_caches

HUB_CACHE = "/root/.cache/huggingface"
VLLM_CACHE = "/root/.cache/vllm"
FLASHINFER_CACHE = "/root/.cache/flashinfer"
_NAMES = {HUB_CACHE: "huggingface-cache", VLLM_CACHE: "vllm-cache", FLASHINFER_CACHE: "flashinfer-cache"}


def volume_name(path: str, prefix: str | None = None) -> str:
    """Return the name of the volume that is mounted at `path`; `prefix` is `SERVICE_VOLUME_PREFIX`."""
    return f"{prefix or ''}{_NAMES[path]}"


def volumes(prefix: str | None = None) -> dict[str | PurePosixPath, modal.Volume]:
    """Return mount path -> volume, created at the first deploy."""
    return {
        path: modal.Volume.from_name(volume_name(path, prefix), create_if_missing=True, version=2) for path in _NAMES
    }


def records_directory() -> Path:
    """Return the directory of the boot records in the container."""
    return _in_container(VLLM_CACHE) / DIRECTORY


def compile_caches() -> dict[str, Path]:
    """Return name of each compile cache -> the directory of its volume in the container."""
    return {
        replica_compile_caches.VLLM: _in_container(VLLM_CACHE),
        replica_compile_caches.FLASHINFER: _in_container(FLASHINFER_CACHE),
    }


def _in_container(mount: str) -> Path:
    """Return where a volume is mounted, from the home of this process: /root on Modal, another in tests."""
    return Path.home() / PurePosixPath(mount).relative_to("/root")
