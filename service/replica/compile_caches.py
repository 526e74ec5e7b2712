"""The engine's compile caches: on local disk while it runs, in archives on the volumes between replicas.

A memory snapshot that has a volume's file open cannot be restored. So they are copied: in before the engine reads, out
once a boot has compiled something new. What another version, GPU or driver compiled is never used; nothing here fails a
boot.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from service.replica import archive
from service.replica.archive import DamagedArchiveError, Stamp

_log = logging.getLogger(__name__)
STORES = VLLM, FLASHINFER = "vllm", "flashinfer"
_UNKNOWN = (
    "unknown"  # where the engine's paths lead until the hardware is known: importing torch makes directories there
)
_COMPACT_AT = 8  # archives in a directory; then one with everything replaces those that are in it
_KEPT_SOFTWARE = 3

# Temporary: inductor and vLLM `*.tmp`, startup_plan `*.tmp.<pid>`, Triton `tmp.pid_*`, DeepGEMM and FlashInfer `tmp/`,
# TileLang `.staging`. Of one process or host: locks, logs, which of its GPUs reach each other. Not compiled: assets.
# The driver's cache of PTX (CUDA_CACHE_PATH) is not shared: it keeps one index, changed in place, that does not merge.
_NOT_SHARED = (
    *("*.tmp", "*.tmp.*", "tmp", "tmp.pid_*", ".staging", "lock", "locks", "*.lock", "*.log", "assets", "xla_cache"),
    *("dummy_cache", "gpu_p2p_access_cache_*"),
)


class Caches:
    """The caches of one engine. Methods block, raise no OSError, and leave no file open.

    Args:
        local: A directory on local disk, the same path on every replica: Triton and ninja keep absolute paths.
        software: Versions of all that compiles, such as `{"vllm": "0.32.0"}`; the processor's architecture is added.
        volumes: Where the volume of each of `STORES` is mounted; none where `local` itself outlives the engine.
        model: Names what vLLM's graphs are compiled for: replicas load their own. FlashInfer's kernels are for all.
    """

    def __init__(
        self,
        local: Path,
        software: Mapping[str, str],
        volumes: Mapping[str, Path] | None = None,
        *,
        model: str = "any",
    ) -> None:
        self._software = _digest({"architecture": platform.machine(), **software})
        self._root = local.absolute() / self._software
        self._volumes = {store: path / "compiled" for store, path in (volumes or {}).items()}
        self._scopes = {VLLM: _name(model), FLASHINFER: "shared"}
        self._fingerprint = ""
        self._known: dict[Path, dict[str, Stamp]] = {}  # by directory: the files that the volumes have
        self._loaded: set[Path] = set()
        self._damaged: set[Path] = set()

    def env(self) -> dict[str, str]:
        """Return the variables that lead the engine here; it is spawned after `load` or `select_hardware`.

        Source: vllm 0.32.0 envs.py, utils/deep_gemm.py, compilation/decorators.py (sets inductor's again per graph);
        torch 2.13.0 _inductor/runtime/cache_dir_utils.py; triton 3.7.1 knobs.py; tilelang 0.1.12 env.py; flashinfer
        0.7.0.post1 jit/env.py (adds `.cache/flashinfer/<version>/<arch>`) and nv_internal/.../deep_gemm/compiler.cuh.
        FlashInfer's autotuning is below VLLM_CACHE_ROOT by itself (model_executor/warmup/flashinfer_autotune_cache.py).
        """
        vllm, flashinfer = (self._root / "current" / store for store in STORES)
        return {
            "VLLM_CACHE_ROOT": str(vllm),
            "TORCHINDUCTOR_CACHE_DIR": str(vllm / "inductor"),
            "TRITON_CACHE_DIR": str(vllm / "triton"),
            "TILELANG_CACHE_DIR": str(vllm / "tilelang"),
            "DG_JIT_CACHE_DIR": str(vllm / "deep_gemm"),
            "FLASHINFER_WORKSPACE_BASE": str(flashinfer),
            "TRTLLM_DG_CACHE_DIR": str(flashinfer / "deep_gemm"),
        }

    def load(self) -> int:
        """Copy in what has come to the volumes since the last call; return its bytes.

        Before `select_hardware`: of all hardware that ran this software, so that a snapshot has it. After: of this.
        A snapshot may be older than the caches, so a second call after the restore can find more.
        """
        if not (self._root / "current").is_symlink():
            self._lead_to(_UNKNOWN)
        try:
            arrived = [(path, store) for store in self._volumes for path in self._new_archives(store)]
        except OSError as error:
            _log.warning("The volumes of the compile caches cannot be read (%s); the engine compiles again.", error)
            return 0
        return sum(self._unpack(path, store) for path, store in arrived)

    def select_hardware(self, fingerprint: str) -> None:
        """Lead the engine, before it reads any, to what this hardware compiled; to an empty place where there is none.

        Args:
            fingerprint: What `Hardware.fingerprint` returns. With "" the engine's caches are not shared.
        """
        self._fingerprint = _name(fingerprint) if self._lead_to(_name(fingerprint) or _UNKNOWN) else ""

    def save(self) -> int:
        """Write what is new to the volumes, one archive each; return its bytes. The caller commits the volumes.

        Files that vanish, change, or may not be complete yet are left for the next call or boot.
        """
        return sum(self._save_new(store) for store in self._volumes) if self._fingerprint else 0

    def _lead_to(self, fingerprint: str) -> bool:
        link, new = self._root / "current", self._root / f".current-{os.getpid()}"
        try:
            for store in STORES:
                (self._root / fingerprint / store).mkdir(parents=True, exist_ok=True)
            new.unlink(missing_ok=True)
            new.symlink_to(fingerprint)
            new.replace(link)
        except OSError as error:
            _log.warning("The compile caches cannot be used (%s); this engine's will not be shared.", error)
            return False
        return True

    def _new_archives(self, store: str) -> list[Path]:
        """Return the archives that were not loaded yet, oldest first; of all, the newest that a boot may load."""
        directories = self._volumes[store].glob(f"{self._software}/{self._fingerprint or '*'}/{self._scopes[store]}")
        newest, _ = archive.divide(path for archive_dir in directories for path in archive.archives_in(archive_dir))
        return [path for path in reversed(newest) if path not in self._loaded | self._damaged]

    def _unpack(self, path: Path, store: str) -> int:
        directory = self._root / path.parent.parent.name / store
        try:
            files = archive.unpack(path, directory)
        except DamagedArchiveError as error:
            self._damaged.add(path)
            _log.warning("Compile cache %s is damaged (%s); the engine compiles again.", path, error)
            return 0
        except OSError as error:
            _log.warning("Compile cache %s was not loaded (%s); the engine compiles again.", path, error)
            return 0
        self._loaded.add(path)
        self._known.setdefault(directory, {}).update(files)
        return sum(size for size, _ in files.values())

    def _save_new(self, store: str) -> int:
        directory = self._root / self._fingerprint / store
        software = self._volumes[store] / self._software
        archive_dir = software / self._fingerprint / self._scopes[store]
        known = self._known.setdefault(directory, {})
        found = archive.files(directory, but=_NOT_SHARED)
        try:
            compact = len(list(archive.archives_in(archive_dir))) >= _COMPACT_AT
            chosen = found if compact else {name: stamp for name, stamp in found.items() if known.get(name) != stamp}
            done = archive.write(archive_dir, directory, chosen) if chosen else None
            if done is None:
                return 0
        except OSError as error:
            _log.warning("The compile caches were not saved (%s); the next boot compiles again.", error)
            return 0
        path, files = done
        known |= files
        replaced = {
            old for old in self._damaged | (self._loaded if compact else set()) if old.parent == archive_dir
        } - {path}
        self._loaded = self._loaded - replaced | {path}
        with suppress(OSError):  # the next writer tries again
            archive.tidy(archive_dir, replaced)
            _drop_old_software(software)
        return sum(size for size, _ in files.values())


def _drop_old_software(current: Path) -> None:
    """Keep what the versions that wrote last compiled: the current ones, and those that a rollback would bring back."""
    os.utime(current)
    by_age = sorted(current.parent.iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for old in by_age[_KEPT_SOFTWARE:]:
        shutil.rmtree(old, ignore_errors=True)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _name(text: str) -> str:
    """Return a text as the name of a directory."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")
