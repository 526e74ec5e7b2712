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

from service import fetch
from service.errors import GatedModelError, WeightsError
from tests.fakes.hub import Hub

from .hub_client import COMMIT, FILES

pytestmark = pytest.mark.usefixtures("cache")
WANTED = fetch.Wanted("org/mine", COMMIT)
GONE_S = 5


def children() -> list[psutil.Process]:
    """Return the downloads of this process."""
    return [child for child in psutil.Process().children() if "service.fetch" in child.cmdline()]


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
    path = fetch.in_child(WANTED, None, said.append)

    assert {file.name: file.read_bytes() for file in path.iterdir()} == FILES
    assert said == [f"Fetching org/mine at revision {COMMIT}: 0.0 GB"]
    assert not children()


def test_fetch_child_refuses_in_the_parents_own_errors(hub: Hub) -> None:
    """A gated model is the same error as without a child; an empty token is none."""
    hub.repositories["org/mine"].gated = "all"
    with pytest.raises(GatedModelError, match="no token is here"):
        fetch.in_child(WANTED, "", lambda _: None)
    assert fetch.in_child(WANTED, hub.token, lambda _: None).is_dir()


def test_fetch_child_whose_connection_is_cut_says_so(hub: Hub) -> None:
    """A server that leaves in the middle of a file is a sentence, not a traceback."""
    hub.cuts_files = True
    with pytest.raises(WeightsError, match=r"org/mine.* cannot be fetched"):
        fetch.in_child(WANTED, None, lambda _: None)


def test_fetch_child_that_is_killed_is_reported(hub: Hub) -> None:
    """No answer is an answer: the code, and that starting again loses nothing."""
    with hub.holding_files():
        killer = when_files_are_asked_for(hub, kill_download)
        with pytest.raises(WeightsError, match=r"ended with code -9.*finished files are kept"):
            fetch.in_child(WANTED, None, lambda _: None)
        killer.join()


def test_fetch_child_ends_with_an_interrupt(hub: Hub) -> None:
    """Ctrl-C amid a file ends the download at once."""
    main = threading.main_thread().ident
    assert main is not None
    with hub.holding_files():
        interrupt = when_files_are_asked_for(hub, lambda: signal.pthread_kill(main, signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            fetch.in_child(WANTED, None, lambda _: None)
        interrupt.join()
    assert not children()


def test_fetch_child_dies_with_its_parent(hub: Hub) -> None:
    """`kill -9` of the one who asked leaves no download behind."""
    asks = f"from service import fetch; fetch.in_child(fetch.Wanted('org/mine', '{COMMIT}'), None, print)"
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
