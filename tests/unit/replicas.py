"""Replicas that share compile caches: two volumes, a local disk for each, and the files that an engine would write."""

from __future__ import annotations

import os
from pathlib import Path

from service.replica import compile_caches
from service.replica.compile_caches import Caches

SOFTWARE = {"vllm": "0.32.0", "torch": "2.13.0"}
H100 = "NVIDIA H100 80GB HBM3, 580.95.05"
OLD_NS = 1_700_000_000_123_456_789  # not a number that a float holds


class Place:
    """Two volumes, and a local disk for each replica."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.volumes = {store: root / f"{store}-volume" for store in compile_caches.STORES}

    def replica(self, disk: str, software: dict[str, str] | None = None, model: str = "tiny") -> Caches:
        """Return the caches of a replica that does not know its hardware yet."""
        return Caches(self.root / disk, software or SOFTWARE, self.volumes, model=model)

    def booted(self, disk: str, gpu: str = H100, software: dict[str, str] | None = None, model: str = "tiny") -> Caches:
        """Return the caches of a replica whose engine may begin."""
        replica = self.replica(disk, software, model)
        replica.select_hardware(gpu)
        replica.load()
        return replica

    def archives(self) -> list[Path]:
        """Return what is on the volumes."""
        return sorted(self.root.glob("*-volume/**/*.tar"))

    def local(self, disk: str) -> dict[str, bytes]:
        """Return what an engine on that disk finds, below `current`."""
        (current,) = (self.root / disk).glob("*/current")
        return {str(path.relative_to(current)): path.read_bytes() for path in current.rglob("*") if path.is_file()}


def make(replica: Caches, name: str, content: bytes = b"compiled", mtime_ns: int = OLD_NS, mode: int = 0o644) -> Path:
    """Write one file as the engine does, by the paths that its environment gives; `name` begins with the store."""
    store, _, rest = name.partition("/")
    variable = {"vllm": "VLLM_CACHE_ROOT", "flashinfer": "FLASHINFER_WORKSPACE_BASE"}[store]
    path = Path(replica.env()[variable]) / rest
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(mode)
    os.utime(path, ns=(mtime_ns, mtime_ns))
    return path
