"""Modal's volumes: the caches that outlive replicas, and where they are mounted.

They are mounted below `~/.cache/`, where huggingface_hub, vLLM and FlashInfer keep their caches by default.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import modal

from service.boots.failures import file_name
from service.boots.records import DIRECTORY
from service.errors import one_line
from service.replica import compile_caches as replica_compile_caches
from service.usage import writer_files as usage

HUB_CACHE = "/root/.cache/huggingface"
VLLM_CACHE = "/root/.cache/vllm"
FLASHINFER_CACHE = "/root/.cache/flashinfer"
BATCHES = "/root/.cache/vllm-batches"  # of the gateway too: files and batches of its clients
GATEWAY = "/root/.cache/vllm-gateway"  # of the gateway alone: no engine may read or write its keys
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


def failures_file(app: str, model: str) -> Path:
    """Return the file in the container that has the model's boot which cannot work."""
    return _in_container(VLLM_CACHE) / file_name(app, model)


def usage_directory() -> Path:
    """Return the directory of the usage records in the container."""
    return _in_container(VLLM_CACHE) / usage.DIRECTORY


def usage_volume(prefix: str | None = None) -> dict[str | PurePosixPath, modal.Volume]:
    """Return mount path -> volume of the one that has the usage records."""
    return {VLLM_CACHE: volumes(prefix)[VLLM_CACHE]}


def gateway_volume(prefix: str | None = None) -> dict[str | PurePosixPath, modal.Volume]:
    """Return mount path -> volume of the gateway's own, created at its first deploy."""
    return {GATEWAY: modal.Volume.from_name(f"{prefix or ''}vllm-gateway", create_if_missing=True, version=2)}


def batches_volume(prefix: str | None = None) -> dict[str | PurePosixPath, modal.Volume]:
    """Return mount path -> volume of the clients' files and batches, created at the gateway's first deploy."""
    return {BATCHES: modal.Volume.from_name(f"{prefix or ''}vllm-batches", create_if_missing=True, version=2)}


def commit_with_open_files(volume: modal.Volume) -> None:
    """Commit a volume of which this container has files open. Blocks.

    Modal's client reloads a volume once it is committed, and that alone fails where files are open.

    Raises:
        OSError: It was not committed, whatever Modal's client raised: its own errors, grpclib's, a bare RuntimeError.
    """
    try:
        volume.commit()
    except Exception as error:
        if not (isinstance(error, RuntimeError) and "open files" in str(error)):
            raise OSError(f"Modal's volume was not committed: {one_line(error)}") from error


def batches_directory(app: str) -> Path:
    """Return the directory of an app's files and batches in the container of its gateway; others share the volume."""
    return _in_container(BATCHES) / app


def keys_directory() -> Path:
    """Return the directory of the keys in the gateway's container."""
    return _in_container(GATEWAY) / "keys"


def compile_caches() -> dict[str, Path]:
    """Return name of each compile cache -> the directory of its volume in the container."""
    return {
        replica_compile_caches.VLLM: _in_container(VLLM_CACHE),
        replica_compile_caches.FLASHINFER: _in_container(FLASHINFER_CACHE),
    }


def _in_container(mount: str) -> Path:
    """Return where a volume is mounted, from the home of this process: /root on Modal, another in tests."""
    return Path.home() / PurePosixPath(mount).relative_to("/root")
