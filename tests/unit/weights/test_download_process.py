"""The download's process: it tells, it refuses in words, and it dies with the one who asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import psutil
import pytest

from service.errors import GatedModelError, WeightsError
from service.weights import download_process
from tests.fakes.hub import Hub
from tests.unit.hub_client import COMMIT, FILES

pytestmark = pytest.mark.usefixtures("cache")
WANTED = download_process.Wanted("org/mine", COMMIT)
GONE_S = 30


def children() -> list[psutil.Process]:
    """Return the downloads of this process."""
    return [child for child in psutil.Process().children() if "service.weights.download_process" in child.cmdline()]


def when_files_are_asked_for(hub: Hub, act: Callable[[], None]) -> threading.Thread:
    """Do something once the download is amid its first file."""
    thread = threading.Thread(target=lambda: hub.asked_for_files.wait(GONE_S) and act())
    thread.start()
    return thread


def kill_download() -> None:
    """Kill the download."""
    children()[0].kill()


def test_fetch_child_brings_the_files_and_tells_their_size(hub: Hub) -> None:
    """The sentence comes before the files, and the directory holds them all."""
    said: list[str] = []
    path = download_process.in_child(WANTED, None, said.append)

    assert {file.name: file.read_bytes() for file in path.iterdir()} == FILES
    assert said == [f"Fetching org/mine at revision {COMMIT}: 0.0 GB"]
    assert not children()


def test_fetch_child_refuses_in_the_parents_own_errors(hub: Hub) -> None:
    """A gated model is the same error as without a child; an empty token is none."""
    hub.repositories["org/mine"].gated = "all"
    with pytest.raises(GatedModelError, match="no token is here"):
        download_process.in_child(WANTED, "", lambda _: None)
    assert download_process.in_child(WANTED, hub.token, lambda _: None).is_dir()


def test_fetch_child_tells_how_far_it_is(hub: Hub) -> None:
    """Bytes on the disk of all that come; at the end all of them, verified."""
    told: list[download_process.Progress] = []
    download_process.in_child(WANTED, None, on_progress=told.append)

    total = sum(map(len, FILES.values()))
    assert told[-1] == download_process.Progress("org/mine", total, total, len(FILES), len(FILES), "verifying")
    assert all(0 <= progress.done_bytes <= total for progress in told)


def test_fetch_child_that_stalls_says_so() -> None:
    """Without one byte for long, what the client waits for will not come."""
    program = (
        "from service.weights import download_process as fetch; fetch.STALL_S = 0.0\n"
        "words = fetch._Words(fetch.Wanted('org/mine', 'abc'))\n"
        "for _ in range(3): words.progress(fetch.Progress('org/mine', 1, 2, 0, 1))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert "org/mine at revision abc stalled" in done.stdout.splitlines()[-1]


def test_fetch_child_that_is_killed_is_reported(hub: Hub) -> None:
    """No answer is an answer: the code, and that starting again loses nothing."""
    with hub.holding_files():
        killer = when_files_are_asked_for(hub, kill_download)
        with pytest.raises(WeightsError, match=r"ended with code -9.*finished files are kept"):
            download_process.in_child(WANTED, None, lambda _: None)
        killer.join()


def test_fetch_child_ends_with_an_interrupt(hub: Hub) -> None:
    """Ctrl-C amid a file ends the download at once."""
    main = threading.main_thread().ident
    assert main is not None
    with hub.holding_files():
        interrupt = when_files_are_asked_for(hub, lambda: signal.pthread_kill(main, signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            download_process.in_child(WANTED, None, lambda _: None)
        interrupt.join()
    assert not children()


def test_fetch_child_dies_with_its_parent(hub: Hub) -> None:
    """`kill -9` of the one who asked leaves no download behind."""
    imports = "from service.weights import download_process as fetch"
    asks = f"{imports}; fetch.in_child(fetch.Wanted('org/mine', '{COMMIT}'), None, print)"
    with hub.holding_files():
        parent = subprocess.Popen([sys.executable, "-c", asks], env=dict(os.environ), stdout=subprocess.DEVNULL)
        assert hub.asked_for_files.wait(GONE_S * 2)
        (child,) = psutil.Process(parent.pid).children()
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + GONE_S
        while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.01)
