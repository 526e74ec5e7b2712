"""The compile caches: what travels, to whom, and where an engine finds it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from service.replica import archive
from service.replica.compile_caches import Caches
from tests.unit.replicas import H100, OLD_NS, SOFTWARE, Place, make

Warnings = Callable[[], list[str]]


def test_caches_loaded_elsewhere_are_the_same_to_the_nanosecond(place: Place, warnings: Warnings) -> None:
    """Content, mode and mtime: ninja builds anew what looks younger than it remembers."""
    first = place.booted("a")
    times = [OLD_NS + i * 7_777_777_777 for i in range(50)]
    for i, ns in enumerate(times):
        make(first, f"vllm/torch_compile_cache/{i}/model", b"%d" % i, ns, 0o755 if i % 2 else 0o600)
    make(first, "flashinfer/.cache/flashinfer/cached_ops/x/x.so", b"so")

    written = first.save()
    second = place.replica("b")
    loaded = second.load()
    second.select_hardware(H100)

    assert written == loaded > 0
    assert place.local("a") == place.local("b")
    for i, ns in enumerate(times):
        status = (Path(second.env()["VLLM_CACHE_ROOT"]) / f"torch_compile_cache/{i}/model").stat()
        assert (status.st_mtime_ns, status.st_mode & 0o777) == (ns, 0o755 if i % 2 else 0o600)
    assert warnings() == []


def test_save_writes_only_what_is_new(place: Place) -> None:
    """A second boot adds an archive with its own file, and a third that made nothing adds none."""
    first = place.booted("a")
    make(first, "vllm/x", b"one")
    assert first.save() == 3
    assert first.save() == 0

    second = place.booted("b")
    make(second, "vllm/y", b"twotwo")
    assert second.save() == 6
    third = place.booted("c")

    assert third.save() == 0
    assert place.local("c") == {"vllm/x": b"one", "vllm/y": b"twotwo"}
    assert len(place.archives()) == 2


def test_file_that_was_rewritten_is_new_and_wins(place: Place) -> None:
    """The archives are read oldest first."""
    first = place.booted("a")
    make(first, "vllm/index.json", b"old")
    first.save()
    os.utime(place.archives()[0], ns=(OLD_NS, OLD_NS))
    make(first, "vllm/index.json", b"new", OLD_NS + 1)

    assert first.save() == 3
    place.booted("b")

    assert place.local("b") == {"vllm/index.json": b"new"}


def test_same_content_has_the_same_name(place: Place) -> None:
    """Two replicas that made the same leave one archive."""
    for disk in ("a", "b"):
        replica = place.replica(disk)
        replica.select_hardware(H100)
        make(replica, "vllm/x")
        replica.save()

    assert len(place.archives()) == 1


def test_writers_at_once_all_arrive(place: Place, warnings: Warnings) -> None:
    """Replicas that finish at one moment do not disturb each other."""
    replicas = [place.booted(f"disk{i}") for i in range(6)]
    for i, replica in enumerate(replicas):
        make(replica, f"vllm/{i}", b"%d" % i * 100_000)
    threads = [threading.Thread(target=replica.save) for replica in replicas]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    place.booted("last")

    assert warnings() == []
    assert len(place.local("last")) == 6
    assert {path.suffix for path in place.root.glob("vllm-volume/**/*") if path.is_file()} == {".tar"}


@pytest.mark.parametrize(
    ("gpu", "software", "model"),
    [
        ("NVIDIA H200, 580.95.05", SOFTWARE, "tiny"),
        ("NVIDIA H100 80GB HBM3, 590.1", SOFTWARE, "tiny"),
        (H100, {**SOFTWARE, "vllm": "0.33.0"}, "tiny"),
        (H100, SOFTWARE, "other"),
    ],
    ids=["gpu", "driver", "vllm", "model"],
)
def test_caches_of_other_hardware_version_or_model_are_not_used(
    place: Place, gpu: str, software: dict[str, str], model: str
) -> None:
    """Whatever takes part in compiling takes part in the key."""
    first = place.booted("a")
    make(first, "vllm/x")
    first.save()

    other = place.replica("b", software, model)
    other.load()
    other.select_hardware(gpu)

    assert place.local("b") == {}


def test_kernels_of_flashinfer_are_for_all_models(place: Place) -> None:
    """They take minutes to build, and models share them."""
    first = place.booted("a")
    make(first, "flashinfer/x.so")
    first.save()
    place.booted("b", model="other")

    assert place.local("b") == {"flashinfer/x.so": b"compiled"}


def test_select_hardware_after_a_snapshot_finds_its_own(place: Place) -> None:
    """Where no GPU is visible the caches of all hardware are loaded; the paths of the environment stay the same."""
    for disk, gpu in (("a", H100), ("b", "NVIDIA H200, 580")):
        replica = place.booted(disk, gpu)
        make(replica, "vllm/x", gpu.encode())
        replica.save()
    restored = place.replica("c")
    restored.load()
    spawned_with = restored.env()
    Path(spawned_with["TORCHINDUCTOR_CACHE_DIR"]).mkdir(parents=True)  # torch does so while it is imported

    restored.select_hardware("NVIDIA H200, 580")

    assert restored.env() == spawned_with
    assert place.local("c") == {"vllm/x": b"NVIDIA H200, 580"}
    restored.select_hardware(H100)
    assert place.local("c") == {"vllm/x": H100.encode()}


def test_load_after_the_restore_brings_what_came_since(place: Place) -> None:
    """The first snapshot is taken before anything was ever compiled."""
    restored = place.replica("a")
    assert restored.load() == 0
    other = place.booted("b")
    make(other, "vllm/x")
    other.save()

    restored.select_hardware(H100)

    assert restored.load() == len(b"compiled")
    assert restored.load() == 0
    assert place.local("a") == {"vllm/x": b"compiled"}
    assert restored.save() == 0


def test_load_leaves_nothing_open(place: Place, warnings: Warnings) -> None:
    """A file of a volume that a snapshot holds open breaks its restore."""
    first = place.booted("a")
    for i in range(20):
        make(first, f"vllm/{i}")
    first.save()
    (place.archives()[0].parent / f"{'0' * 64}.tar").write_bytes(b"damaged")

    second = place.replica("b")
    second.load()

    assert len(warnings()) == 1
    opened = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert [path for path in opened if path.is_relative_to(place.root)] == []
    assert str(place.root) not in Path("/proc/self/maps").read_text()


def test_temporary_and_local_files_do_not_travel(place: Place) -> None:
    """Locks, unfinished files, logs, assets, and what is true of one host only."""
    replica = place.booted("a")
    for name in (
        "vllm/torch_compile_cache/k/rank_0_0/model.77.tmp",
        "vllm/inductor/.77.88.tmp",
        "vllm/inductor/locks/k.lock",
        "vllm/inductor/memoizer_cache.lock",
        "vllm/startup_plan/startup_plan_1.json.tmp.77",
        "vllm/triton/K/tmp.pid_77_x/kernel.cubin",
        "vllm/deep_gemm/tmp/x/kernel.cubin",
        "vllm/tilelang/.staging/x/kernel",
        "vllm/assets/image.png",
        "vllm/gpu_p2p_access_cache_for_0,1.json",
        "flashinfer/.cache/flashinfer/0.7/90a/cached_ops/tmp/x.lock",
        "flashinfer/.cache/flashinfer/flashinfer_jit.log",
    ):
        make(replica, name)
    kept = "flashinfer/.cache/flashinfer/0.7/90a/cached_ops/x/.ninja_log"
    make(replica, kept)
    link = Path(replica.env()["VLLM_CACHE_ROOT"]) / "link"
    link.symlink_to("/etc/passwd")

    replica.save()
    place.booted("b")

    assert place.local("b") == {kept: b"compiled"}


def test_file_that_may_still_be_being_written_waits(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A linker writes in place, so a file of this moment may be half of one."""
    monkeypatch.setattr("service.replica.archive._SETTLED_S", 60)
    replica = place.booted("a")
    path = make(replica, "vllm/x.so", mtime_ns=time.time_ns())

    assert replica.save() == 0
    os.utime(path, (time.time() - 61,) * 2)

    assert replica.save() == len(b"compiled")


@pytest.mark.parametrize(
    "change", [lambda path: path.write_bytes(b"compiled and more"), Path.unlink], ids=["grows", "vanishes"]
)
def test_file_that_changes_while_it_is_read_is_left_out(
    place: Place, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object], warnings: Warnings
) -> None:
    """The engine is running and knows nothing of the copy."""
    replica = place.booted("a")
    path = make(replica, "vllm/changing")
    make(replica, "vllm/steady")
    listed = archive.files

    def list_then_change(*arguments: object, **more: object) -> dict[str, archive.Stamp]:
        found = listed(*arguments, **more)  # type: ignore[arg-type]
        if "changing" in found:
            change(path)
        return found

    monkeypatch.setattr(archive, "files", list_then_change)

    assert replica.save() == len(b"compiled")
    place.booted("b")
    assert place.local("b") == {"vllm/steady": b"compiled"}
    assert warnings() == []


def test_without_volumes_the_local_directory_is_the_cache(tmp_path: Path) -> None:
    """On a laptop nothing is copied, and the next start finds what the last one made."""
    first = Caches(tmp_path, SOFTWARE)
    assert first.load() == 0
    first.select_hardware("cpu x")
    make(first, "vllm/x")
    assert first.save() == 0

    second = Caches(tmp_path, SOFTWARE)
    second.load()
    second.select_hardware("cpu x")

    assert (Path(second.env()["VLLM_CACHE_ROOT"]) / "x").read_bytes() == b"compiled"


def test_load_keeps_the_hardware_that_another_engine_selected(tmp_path: Path) -> None:
    """On a laptop a second service starts while the first one serves."""
    first = Caches(tmp_path, SOFTWARE)
    first.select_hardware("cpu x")
    make(first, "vllm/x")
    Caches(tmp_path, SOFTWARE).load()

    assert (Path(first.env()["VLLM_CACHE_ROOT"]) / "x").exists()


def test_unknown_hardware_shares_nothing(place: Place) -> None:
    """A driver that does not answer must not put its caches where others look."""
    replica = place.booted("a", gpu="")
    make(replica, "vllm/x")

    assert replica.save() == 0
    assert place.archives() == []


def test_every_variable_leads_below_the_link(place: Place) -> None:
    """The environment is fixed when the engine is spawned, and that is before the hardware is known."""
    env = place.replica("a").env()

    assert all(
        path.parent.name == "current" or path.parent.parent.name == "current" for path in map(Path, env.values())
    )
    assert set(env) >= {"VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE"}
