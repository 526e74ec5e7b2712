"""The engine's compile caches: on local disk while it runs, between replicas in archives on the volumes.

A memory snapshot that holds a volume's file open cannot be restored, hence copies: in before the engine reads, out once
a boot has made something new. What another version, GPU or driver made is never used; nothing here fails a boot.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from service.replica import archive
from service.replica.archive import DamagedArchiveError, Stamp

STORES = VLLM, FLASHINFER = "vllm", "flashinfer"
_NOBODY = "nobody"  # where the engine's paths lead until the machine is known: importing torch makes directories there
_COMPACT_AT = 8  # archives on a shelf; then one with everything replaces those that are in it
_KEPT_SOFTWARE = 3

# Temporary: inductor and vLLM `*.tmp`, startup_plan `*.tmp.<pid>`, Triton `tmp.pid_*`, DeepGEMM and FlashInfer `tmp/`,
# TileLang `.staging`. Of one process or host: locks, logs, which of its GPUs reach each other. Not compiled: assets.
# The driver's cache of PTX (CUDA_CACHE_PATH) stays at home: it keeps one index, changed in place, that does not merge.
_STAYS = ("*.tmp", "*.tmp.*", "tmp", "tmp.pid_*", ".staging", "lock", "locks", "*.lock", "*.log", "assets", "xla_cache",
          "dummy_cache", "gpu_p2p_access_cache_*")  # fmt: skip


class Caches:
    """The caches of one engine. Methods block, raise no OSError, and leave no file open.

    Args:
        local: A directory on local disk, the same path on every replica: Triton and ninja keep absolute paths.
        software: Versions of all that compiles, such as `{"vllm": "0.32.0"}`; the processor's architecture is added.
        volumes: Where the volume of each of `STORES` is mounted; none where `local` itself outlives the engine.
        model: Names what vLLM's graphs are compiled for: replicas take in their own. FlashInfer's kernels are for all.
        say: Called with a sentence when something was left out.
    """

    def __init__(
        self,
        local: Path,
        software: Mapping[str, str],
        volumes: Mapping[str, Path] | None = None,
        *,
        model: str = "any",
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._software = _digest({"architecture": platform.machine(), **software})
        self._root = local.absolute() / self._software
        self._volumes = {store: path / "compiled" for store, path in (volumes or {}).items()}
        self._scopes = {VLLM: _name(model), FLASHINFER: "shared"}
        self._say = say
        self._machine = ""
        self._known: dict[Path, dict[str, Stamp]] = {}  # by directory: the files that the volumes have
        self._taken: set[Path] = set()
        self._damaged: set[Path] = set()

    def env(self) -> dict[str, str]:
        """Return the variables that lead the engine here; it is spawned after `take_in` or `choose`.

        Source: vllm 0.32.0 envs.py, utils/deep_gemm.py, compilation/decorators.py (sets inductor's anew per graph);
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

    def take_in(self) -> int:
        """Copy in what has come to the volumes since the last call; return its bytes.

        Before `choose`: of every machine that ran this software, so that a snapshot holds it. After: of this machine.
        A snapshot may be older than the caches, so a second call after the restore is worth its while.
        """
        if not (self._root / "current").is_symlink():
            self._lead_to(_NOBODY)
        try:
            arrived = [(path, store) for store in self._volumes for path in self._arrived(store)]
        except OSError as error:
            self._say(f"The compile caches' volumes cannot be read ({error}); the engine compiles again.")
            return 0
        return sum(self._unpack(path, store) for path, store in arrived)

    def choose(self, machine: str) -> None:
        """Lead the engine to what this machine made, before it reads any; to an empty place where that is nothing.

        Args:
            machine: What `Hardware.fingerprint` returns. With "" the engine compiles for itself alone.
        """
        self._machine = _name(machine) if self._lead_to(_name(machine) or _NOBODY) else ""

    def copy_out(self) -> int:
        """Write what is new to the volumes, an archive each; return its bytes. The caller commits the volumes.

        Files that vanish, change or may still be being written are left for the next call or boot.
        """
        return sum(self._write_news(store) for store in self._volumes) if self._machine else 0

    def _lead_to(self, machine: str) -> bool:
        link, new = self._root / "current", self._root / f".current-{os.getpid()}"
        try:
            for store in STORES:
                (self._root / machine / store).mkdir(parents=True, exist_ok=True)
            new.unlink(missing_ok=True)
            new.symlink_to(machine)
            new.replace(link)
        except OSError as error:
            self._say(f"The compile caches cannot be used ({error}); the engine compiles for itself alone.")
            return False
        return True

    def _arrived(self, store: str) -> list[Path]:
        """Return the archives that were not taken in yet, oldest first; of all, the newest that a boot may take."""
        shelves = self._volumes[store].glob(f"{self._software}/{self._machine or '*'}/{self._scopes[store]}")
        newest, _ = archive.divide(path for shelf in shelves for path in archive.on(shelf))
        return [path for path in reversed(newest) if path not in self._taken | self._damaged]

    def _unpack(self, path: Path, store: str) -> int:
        directory = self._root / path.parent.parent.name / store
        try:
            files = archive.unpack(path, directory)
        except DamagedArchiveError as error:
            self._damaged.add(path)
            self._say(f"Compile cache {path} is damaged ({error}); the engine compiles again.")
            return 0
        except OSError as error:
            self._say(f"Compile cache {path} was not copied in ({error}); the engine compiles again.")
            return 0
        self._taken.add(path)
        self._known.setdefault(directory, {}).update(files)
        return sum(size for size, _ in files.values())

    def _write_news(self, store: str) -> int:
        directory = self._root / self._machine / store
        software = self._volumes[store] / self._software
        shelf = software / self._machine / self._scopes[store]
        known = self._known.setdefault(directory, {})
        found = archive.files(directory, but=_STAYS)
        try:
            compact = len(list(archive.on(shelf))) >= _COMPACT_AT
            chosen = found if compact else {name: stamp for name, stamp in found.items() if known.get(name) != stamp}
            done = archive.write(shelf, directory, chosen) if chosen else None
            if done is None:
                return 0
        except OSError as error:
            self._say(f"The compile caches were not copied out ({error}); the next boot compiles again.")
            return 0
        path, files = done
        known |= files
        replaced = {old for old in self._damaged | (self._taken if compact else set()) if old.parent == shelf} - {path}
        self._taken = self._taken - replaced | {path}
        with suppress(OSError):  # whoever writes next tries again
            archive.tidy(shelf, replaced)
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
