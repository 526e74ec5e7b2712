"""The archives of compile caches: damage, full disks, merging, and what is removed."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from service.replica import archive
from tests.unit.replicas import H100, OLD_NS, Place, make

Warnings = Callable[[], list[str]]


def put(directory: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    """Put an archive with these members into a directory, named by its digest."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    path = directory / f"{hashlib.sha256(data.getvalue()).hexdigest()}.tar"
    path.write_bytes(data.getvalue())
    return path


def test_damaged_archive_is_logged_skipped_and_removed_by_the_next_writer(place: Place, warnings: Warnings) -> None:
    """A cache is a convenience: the boot goes on, and compiles."""
    first = place.booted("a")
    make(first, "vllm/x", b"x" * 100_000)
    first.save()
    (damaged,) = place.archives()
    damaged.write_bytes(damaged.read_bytes()[:50_000])

    second = place.booted("b")
    assert place.local("b") == {}
    make(second, "vllm/x", b"x" * 100_000)
    second.save()

    assert len(warnings()) == 1
    assert str(damaged) in warnings()[0]
    assert "damaged" in warnings()[0]
    assert place.booted("c").save() == 0
    assert len(warnings()) == 1


def odd(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    """Return a member that no writer of ours makes."""
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


@pytest.mark.parametrize(
    "member",
    [
        odd("../x"),
        odd("/tmp/x"),  # noqa: S108 - a name in an archive
        odd("y", tarfile.SYMTYPE, "../../.."),
        odd("y", tarfile.SYMTYPE, "inside"),
        odd("y", tarfile.LNKTYPE, "/etc/passwd"),
        odd("y", tarfile.FIFOTYPE),
        odd("y", tarfile.CHRTYPE),
    ],
    ids=["parent", "absolute", "symlink-out", "symlink", "hardlink", "fifo", "device"],
)
def test_archive_with_an_odd_member_is_refused_whole(place: Place, member: tarfile.TarInfo, warnings: Warnings) -> None:
    """Nothing of it is written, not even its good files."""
    first = place.booted("a")
    make(first, "vllm/x")
    first.save()
    (good,) = place.archives()
    put(good.parent, (tarfile.TarInfo("good"), b"good"), (member, b""))
    outside = sorted(place.root.iterdir())

    place.booted("b")

    assert place.local("b") == {"vllm/x": b"compiled"}
    assert len(warnings()) == 1
    assert sorted(place.root.iterdir()) == sorted([*outside, place.root / "b"])


def full(*_: object, **__: object) -> None:
    """Stand for a disk that has no room left."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["fsync", "replace", "mkdir"])
def test_full_volume_is_logged_and_leaves_nothing_behind(
    place: Place, monkeypatch: pytest.MonkeyPatch, where: str, warnings: Warnings
) -> None:
    """The boot goes on, and the next copy out finds the same news."""
    replica = place.booted("a")
    make(replica, "vllm/x")
    with monkeypatch.context() as patch:
        patch.setattr(os if where == "fsync" else Path, where, full)
        assert replica.save() == 0

    assert len(warnings()) == 1
    assert "No space left on device" in warnings()[0]
    assert [path for path in place.root.glob("vllm-volume/**/*") if path.is_file()] == []
    assert replica.save() == len(b"compiled")


def test_full_local_disk_is_logged_and_leaves_no_half_file(
    place: Place, monkeypatch: pytest.MonkeyPatch, warnings: Warnings
) -> None:
    """What did not fit is compiled."""
    first = place.booted("a")
    make(first, "vllm/x")
    first.save()
    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", full)
        second = place.booted("b")

    assert "No space left on device" in warnings()[0]
    assert place.local("b") == {}
    assert second.load() == len(b"compiled")


def test_local_disk_that_cannot_be_written_is_logged(place: Place, warnings: Warnings) -> None:
    """The engine then compiles for itself; nothing is copied out, and nothing raises."""
    (place.root / "file").touch()
    replica = place.replica("file")

    replica.load()
    replica.select_hardware(H100)

    assert replica.save() == 0
    assert len(warnings()) == 2
    assert "compile caches" in warnings()[0]


def test_archives_are_merged_after_eight(place: Place, warnings: Warnings) -> None:
    """The first boot's archive, which has nearly everything, must not be the one that falls off."""
    for i in range(10):
        replica = place.booted(f"disk{i}")
        make(replica, f"vllm/{i}")
        replica.save()
        assert len(place.archives()) <= 8
    place.booted("last")

    assert set(place.local("last")) == {f"vllm/{i}" for i in range(10)}
    assert warnings() == []


def test_archives_of_many_writers_are_merged_without_news(place: Place) -> None:
    """Replicas that began together all wrote the same; the next boot takes them in and leaves one."""
    replicas = [place.booted(f"disk{i}") for i in range(9)]
    for i, replica in enumerate(replicas):
        make(replica, "vllm/x", mtime_ns=OLD_NS + i)
        replica.save()
    assert len(place.archives()) == 9

    assert place.booted("b").save() == len(b"compiled")

    assert len(place.archives()) == 1
    assert place.booted("c").save() == 0


def test_oldest_archives_go_when_there_is_too_much(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A volume is finite."""
    monkeypatch.setattr(archive, "_MAX_BYTES", 50_000)
    replica = place.booted("a")
    for i in range(4):
        make(replica, f"vllm/{i}", b"%d" % i * 15_000)
        replica.save()
        for path in place.archives():  # each a day older than the next
            os.utime(path, ns=(path.stat().st_mtime_ns - 86_400 * 10**9,) * 2)
    place.booted("b")

    assert set(place.local("b")) == {"vllm/2", "vllm/3"}
    assert len(place.archives()) == 2


def test_caches_of_old_versions_are_removed(place: Place) -> None:
    """The three that wrote last stay, for a rollback."""
    for i in range(5):
        replica = place.booted(f"disk{i}", software={"vllm": f"0.{i}"})
        make(replica, "vllm/x")
        replica.save()
        for path in (place.volumes["vllm"] / "compiled").iterdir():
            os.utime(path, ns=(path.stat().st_mtime_ns - 86_400 * 10**9,) * 2)

    assert len(list((place.volumes["vllm"] / "compiled").iterdir())) == 3
    place.booted("old", software={"vllm": "0.1"})
    place.booted("new", software={"vllm": "0.2"})
    assert place.local("old") == {}
    assert place.local("new") == {"vllm/x": b"compiled"}


def test_abandoned_temporary_archive_is_removed(place: Place) -> None:
    """A replica may be killed while it writes; another may be writing right now."""
    replica = place.booted("a")
    make(replica, "vllm/x")
    replica.save()
    directory = place.archives()[0].parent
    (directory / ".dead.tmp").touch()
    os.utime(directory / ".dead.tmp", ns=(OLD_NS, OLD_NS))
    (directory / ".alive.tmp").touch()
    make(replica, "vllm/y")
    replica.save()

    assert [path.name for path in directory.glob(".*")] == [".alive.tmp"]
