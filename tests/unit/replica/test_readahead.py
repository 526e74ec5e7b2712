"""Reading weights ahead: which files in which order, how much of them, and that nothing of it holds up a boot."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service import memory
from service.replica import page_cache, readahead
from service.replica.readahead import PIECE, STRETCH, THREADS, Readahead, weight_files

END_S = 30.0
MIB = 1024**2
preadv = os.preadv


@pytest.fixture(autouse=True)
def _nothing_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every byte read: files that a test has just written are in memory."""
    monkeypatch.setattr(readahead, "is_cached", lambda *_: False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a directory with three shards, of which a natural order is not the alphabet's, and an index."""
    return filled(tmp_path / "model", {"model-2.safetensors": 3, "model-10.safetensors": 2, "model-1.safetensors": 1})


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Have every read hang as on a dead mount until the test is over; return what tells that one has begun."""
    begun, over = threading.Event(), threading.Event()

    def hang(fd: int, buffers: list[memoryview], offset: int) -> int:
        begun.set()
        assert over.wait(END_S)
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", hang)
    yield begun
    over.set()


def filled(directory: Path, mebibytes: dict[str, int], *, index: str = "model", left_out: tuple[str, ...] = ()) -> Path:
    """Write files of so many MiB and the index that names them, less those that are left out."""
    directory.mkdir()
    for name, size in mebibytes.items():
        (directory / name).write_bytes(os.urandom(size * MIB))
    weight_map = {f"weight.{name}": name for name in mebibytes if name not in left_out}
    (directory / f"{index}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def done(*directories: Path | None, memory_share: float = 0.8) -> Readahead:
    """Run a readahead to its end."""
    before = threads()
    ahead = Readahead(*directories, memory_share=memory_share)
    ahead.start()
    assert ended(threads() - before)
    return ahead


def threads() -> set[threading.Thread]:
    """Return the threads that read ahead now."""
    return {thread for thread in threading.enumerate() if thread.name == "readahead"}


def ended(readers: set[threading.Thread]) -> bool:
    """Wait for threads to end; False when one has not after END_S."""
    deadline = time.monotonic() + END_S
    for thread in readers:
        thread.join(max(deadline - time.monotonic(), 0))
    return not any(thread.is_alive() for thread in readers)


@pytest.fixture
def failures(caplog: pytest.LogCaptureFixture) -> Callable[[], dict[str, str]]:
    """Return a function that tells the logged failures: the name of the file or directory, and the error."""
    caplog.set_level(logging.DEBUG, readahead.__name__)

    def logged() -> dict[str, str]:
        records = [record.args for record in caplog.records if record.name == readahead.__name__]
        return {args[0].name: repr(args[1]) for args in records if isinstance(args, tuple)}

    return logged


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Return what will hold every read: file, offset, bytes."""
    reads: list[tuple[str, int, int]] = []

    def record(fd: int, buffers: list[memoryview], offset: int) -> int:
        count = preadv(fd, buffers, offset)
        reads.append((Path(f"/proc/self/fd/{fd}").readlink().name, offset, count))
        return count

    monkeypatch.setattr(os, "preadv", record)
    return reads


def names(directory: Path) -> list[str]:
    """Return the names of the weight files, in order."""
    return [file.name for file in weight_files(directory)]


def test_weight_files_with_numbers_come_in_natural_order(model: Path) -> None:
    """Shard 10 is loaded after shard 2."""
    assert names(model) == ["model-1.safetensors", "model-2.safetensors", "model-10.safetensors"]


def test_weight_files_that_the_index_leaves_out_are_not_read(tmp_path: Path) -> None:
    """A repository may hold the same weights twice."""
    sizes = {"model-1.safetensors": 0, "model-2.safetensors": 0, "copy.safetensors": 0, "model.bin": 0}

    assert names(filled(tmp_path / "model", sizes, left_out=("copy.safetensors",))) == [
        "model-1.safetensors",
        "model-2.safetensors",
    ]


def test_weight_files_of_mistral_go_before_all_others(tmp_path: Path) -> None:
    """The loader takes the format for Mistral's own where there is one `consolidated` file."""
    directory = filled(tmp_path / "model", {"model-1.safetensors": 0})
    (directory / "consolidated.safetensors").touch()

    assert names(directory) == ["consolidated.safetensors"]


def test_weight_files_without_an_index_are_all_there_are(tmp_path: Path) -> None:
    """Small models have one file, and no index."""
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").touch()

    assert names(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": []}', "{}"])
def test_weight_files_with_a_damaged_index_raise_one_kind_of_error(tmp_path: Path, index: str) -> None:
    """Whatever is in it."""
    (tmp_path / "model.safetensors.index.json").write_text(index)

    with pytest.raises(ValueError, match=r"weight_map|Expecting"):
        weight_files(tmp_path)


def test_weight_files_that_are_links_are_read(tmp_path: Path) -> None:
    """What links point to in the hub's cache counts as a file."""
    (tmp_path / "blob").write_bytes(b"numbers")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to(tmp_path / "blob")

    assert done(snapshot).bytes_read == len(b"numbers")


def test_readahead_reads_every_byte_once(
    model: Path, monkeypatch: pytest.MonkeyPatch, failures: Callable[[], dict[str, str]]
) -> None:
    """No gap and no overlap, in pieces."""
    reads = recorded(monkeypatch)

    ahead = done(model)

    assert ahead.bytes_read == 6 * MIB
    assert ahead.bytes_cached == 0
    assert {(file, offset) for file, offset, _ in reads} == {
        (f"model-{number}.safetensors", offset * MIB)
        for number, size in ((1, 1), (2, 3), (10, 2))
        for offset in range(size)
    }
    assert len(reads) == 6
    assert not failures()


def test_readahead_of_one_thread_follows_the_order_of_loading(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's shards one after the other, then the draft's."""
    draft = filled(model.parent / "draft", {"model.safetensors": 1})
    monkeypatch.setattr(readahead, "THREADS", 1)
    reads = recorded(monkeypatch)

    done(model, None, draft)

    files = list(dict.fromkeys(file for file, _, _ in reads))
    assert files == ["model-1.safetensors", "model-2.safetensors", "model-10.safetensors", "model.safetensors"]
    assert [offset for file, offset, _ in reads if file == "model-2.safetensors"] == [0, MIB, 2 * MIB]


def test_readahead_of_a_lone_file_reads_it_in_several_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one thread alone would read a model in one file."""
    directory = filled(tmp_path / "model", {"model.safetensors": 40})
    monkeypatch.setattr(readahead, "THREADS", 8)
    reads = recorded(monkeypatch)
    together = threading.Barrier(3, timeout=END_S)
    record = os.preadv

    def meet(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset % STRETCH == 0:  # the first piece of a part: three threads are at it at a time
            together.wait()
        return record(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", meet)

    assert done(directory).bytes_read == 40 * MIB
    assert sorted(offset for _, offset, _ in reads) == [MIB * piece for piece in range(40)]


def test_readahead_stops_where_the_memory_ends(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More would push out what was read first: the first files are read, and a part of the one that does not fit."""
    monkeypatch.setattr(readahead, "available_bytes", lambda: 4 * MIB)
    reads = recorded(monkeypatch)

    assert done(model, memory_share=0.5).bytes_read == 2 * MIB
    assert {(file, offset) for file, offset, _ in reads} == {("model-1.safetensors", 0), ("model-2.safetensors", 0)}


def test_readahead_that_hangs_is_left_behind_in_time(model: Path, hanging: threading.Event) -> None:
    """A dead mount: `start` returned, `stop` returns, again and again; nothing waits for the threads."""
    before = threads()
    ahead = Readahead(model)
    ahead.start()
    assert hanging.wait(END_S)

    for _ in range(2):
        began = time.monotonic()
        ahead.stop()
        assert time.monotonic() - began < 5

    readers = threads() - before
    assert readers
    assert all(thread.is_alive() and thread.daemon for thread in readers)


def test_readahead_that_hangs_does_not_keep_its_process(model: Path) -> None:
    """The process ends as if there were no thread."""
    program = (
        "import os, sys, threading, time; from pathlib import Path; from service.replica.readahead import Readahead\n"
        "begun = threading.Event()\n"
        "os.preadv = lambda *_: (begun.set(), time.sleep(600))\n"
        f"Readahead(Path({str(model)!r})).start()\n"
        "begun.wait(30)"
    )
    began = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=END_S)

    assert time.monotonic() - began < 10


def test_readahead_that_is_stopped_reads_no_further(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread ends with the piece it is at."""
    ahead, before = Readahead(model), threads()

    def stop(fd: int, buffers: list[memoryview], offset: int) -> int:
        ahead._halt.set()
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", stop)
    ahead.start()

    assert ended(threads() - before)
    assert 0 < ahead.bytes_read <= THREADS * PIECE


def test_readahead_that_never_began_can_be_stopped(model: Path) -> None:
    """A boot that fails early stops what it has."""
    ahead = Readahead(model)
    ahead.stop()

    assert ahead.bytes_read == 0


def test_readahead_of_a_missing_directory_logs_it_and_reads_the_rest(
    model: Path, failures: Callable[[], dict[str, str]]
) -> None:
    """A draft that vanished takes nothing from the model."""
    gone = model.parent / "gone"
    ahead = done(gone, model)

    assert failures()["gone"].startswith("FileNotFoundError(")
    assert ahead.bytes_read == 6 * MIB


def test_readahead_of_a_vanished_file_logs_it_and_reads_the_rest(
    model: Path, failures: Callable[[], dict[str, str]]
) -> None:
    """A link to nothing, as a deleted blob leaves it."""
    file = model / "model-2.safetensors"
    file.unlink()
    file.symlink_to(model / "nothing")
    ahead = done(model)

    assert failures()[file.name].startswith("FileNotFoundError(")
    assert ahead.bytes_read == 3 * MIB


def test_readahead_of_an_unreadable_file_ends_that_file(
    model: Path, monkeypatch: pytest.MonkeyPatch, failures: Callable[[], dict[str, str]]
) -> None:
    """EIO is the loader's to report; the other files are read."""

    def fail(fd: int, buffers: list[memoryview], offset: int) -> int:
        if Path(f"/proc/self/fd/{fd}").readlink().name == "model-2.safetensors":
            raise OSError(errno.EIO, "Input/output error")
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", fail)
    ahead = done(model)

    assert failures() == {"model-2.safetensors": "OSError(5, 'Input/output error')"}
    assert ahead.bytes_read == 3 * MIB


def test_readahead_of_a_file_that_got_shorter_ends_that_file(
    model: Path, monkeypatch: pytest.MonkeyPatch, failures: Callable[[], dict[str, str]]
) -> None:
    """It does not wait for bytes that never come."""
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, buffers, offset) if offset < MIB else 0)
    ahead = done(model)

    assert set(failures()) == {"model-2.safetensors", "model-10.safetensors"}
    assert ahead.bytes_read == 3 * MIB


def test_readahead_passes_over_what_is_no_file(model: Path, failures: Callable[[], dict[str, str]]) -> None:
    """Opening a named pipe would hang."""
    os.mkfifo(model / "model-0.safetensors")
    (model / "model.safetensors.index.json").unlink()
    ahead = done(model)

    assert ahead.bytes_read == 6 * MIB
    assert not failures()


def test_readahead_without_meminfo_reads_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch, failures: Callable[[], dict[str, str]]
) -> None:
    """Whatever is wrong, it stays with the readahead."""
    monkeypatch.setattr(memory, "_PROC", model / "nothing")
    ahead = done(model)

    assert ahead.bytes_read == 0
    assert [error.partition("(")[0] for error in failures().values()] == ["FileNotFoundError"]


def test_readahead_leaves_no_file_open(model: Path) -> None:
    """A volume cannot be reloaded, nor a snapshot taken, with one open."""
    before = set(Path("/proc/self/fd").iterdir())
    done(model)

    assert set(Path("/proc/self/fd").iterdir()) <= before


def test_readahead_of_what_is_in_memory_reads_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is counted, and left alone."""
    monkeypatch.setattr(readahead, "is_cached", lambda *_: True)
    reads = recorded(monkeypatch)
    ahead = done(model)

    assert (ahead.bytes_read, ahead.bytes_cached) == (0, 6 * MIB)
    assert not reads


def test_page_cache_of_a_file_that_was_just_read_holds_it(model: Path) -> None:
    """Unless the file system does not tell, which is answered as no."""
    with (model / "model-2.safetensors").open("rb") as file:
        file.read()
        try:
            told = preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT) == 1
        except OSError:
            told = False

        assert page_cache.is_cached(file.fileno(), 0, 3 * MIB, MIB) == told


@pytest.mark.parametrize("error", [BlockingIOError(), OSError(errno.EOPNOTSUPP, ""), NotImplementedError()])
def test_page_cache_that_does_not_tell_holds_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Not in memory, a file system that has no such flag (gVisor's), a Python without the call."""

    def refuse(*_: object) -> int:
        raise error

    monkeypatch.setattr(os, "preadv", refuse)

    assert not page_cache.is_cached(0, 0, MIB, MIB)


def test_page_cache_under_a_python_without_the_flag_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was built against an old glibc."""
    monkeypatch.setattr(page_cache, "_NOWAIT", 0)

    assert not page_cache.is_cached(0, 0, MIB, MIB)
