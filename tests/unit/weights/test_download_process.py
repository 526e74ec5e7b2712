"""The download's process: it reports logs, progress and errors, and dies with its parent."""

from __future__ import annotations

import logging
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
from service.weights.download_process import download_in_child
from service.weights.files import RepositorySpec
from service.weights.progress import Progress
from tests.fakes.hub import Hub
from tests.unit.hub_client import COMMIT, FILES

pytestmark = pytest.mark.usefixtures("cache")
REPOSITORY = RepositorySpec("org/mine", COMMIT)
GONE_S = 30


def children() -> list[psutil.Process]:
    """Return the downloads of this process."""
    return [child for child in psutil.Process().children() if "service.weights.download_process" in child.cmdline()]


def when_files_are_asked_for(hub: Hub, act: Callable[[], None]) -> threading.Thread:
    """Call something once the download has requested its first file."""
    thread = threading.Thread(target=lambda: hub.files_requested.wait(GONE_S) and act())
    thread.start()
    return thread


def kill_download() -> None:
    """Kill the download."""
    children()[0].kill()


def test_download_in_child_brings_the_files_and_logs_their_size(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    """The child's log records are the parent's, with logger and level, and the directory holds all files."""
    caplog.set_level(logging.INFO)
    path = download_in_child(REPOSITORY)

    assert {file.name: file.read_bytes() for file in path.iterdir()} == FILES
    message = f"Fetching org/mine at revision {COMMIT}: 0.0 GB"
    assert caplog.record_tuples == [("service.weights.download", logging.INFO, message)]
    assert not children()


def test_download_in_child_raises_the_errors_of_the_child(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Class, message and hint; the token comes with the environment, and an empty variable is none."""
    hub.repositories["org/mine"].gated = "all"
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(GatedModelError, match="no token is here") as caught:
        download_in_child(REPOSITORY)
    assert caught.value.hint.startswith("Accept its licence at ")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert download_in_child(REPOSITORY).is_dir()


def test_download_in_child_reports_progress(hub: Hub) -> None:
    """Bytes on the disk; at the end all of them are verified."""
    told: list[Progress] = []
    download_in_child(REPOSITORY, told.append)

    total = sum(map(len, FILES.values()))
    assert told[-1] == Progress("org/mine", total, total, len(FILES), len(FILES), "verifying")
    assert all(0 <= progress.done_bytes <= total for progress in told)


def test_download_that_stalls_ends_with_an_error() -> None:
    """No byte has arrived for too long."""
    program = (
        "from service.weights import download_process as child; child.STALL_S = 0.0\n"
        "parent = child._ParentPipe(child.RepositorySpec('org/mine', 'abc'))\n"
        "for _ in range(3): parent.report(child.Progress('org/mine', 1, 2, 0, 1))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert "org/mine at revision abc stalled" in done.stdout.splitlines()[-1]


def test_download_child_that_is_killed_is_reported(hub: Hub) -> None:
    """With its exit code, and the hint that nothing finished is lost."""
    with hub.holding_files():
        killer = when_files_are_asked_for(hub, kill_download)
        with pytest.raises(WeightsError, match=r"ended with code -9.*finished files are kept"):
            download_in_child(REPOSITORY)
        killer.join()


def test_download_child_ends_with_an_interrupt(hub: Hub) -> None:
    """Ctrl-C during a file ends the download at once."""
    main = threading.main_thread().ident
    assert main is not None
    with hub.holding_files():
        interrupt = when_files_are_asked_for(hub, lambda: signal.pthread_kill(main, signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            download_in_child(REPOSITORY)
        interrupt.join()
    assert not children()


def test_download_child_that_is_signalled_with_its_parent_goes_on(hub: Hub) -> None:
    """Systemd signals every process of a service; the parent alone decides when this one ends."""

    def signal_child() -> None:
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            children()[0].send_signal(number)
        hub.may_send_files.set()

    with hub.holding_files():
        signaller = when_files_are_asked_for(hub, signal_child)
        path = download_in_child(REPOSITORY)
        signaller.join()
    assert {file.name: file.read_bytes() for file in path.iterdir()} == FILES


def test_download_child_dies_with_its_parent(hub: Hub) -> None:
    """`kill -9` of the parent leaves no download behind."""
    imports = "from service.weights import download_process as parent"
    asks = f"{imports}; parent.download_in_child(parent.RepositorySpec('org/mine', '{COMMIT}'))"
    with hub.holding_files():
        parent = subprocess.Popen([sys.executable, "-c", asks], env=dict(os.environ), stdout=subprocess.DEVNULL)
        assert hub.files_requested.wait(GONE_S * 2)
        (child,) = psutil.Process(parent.pid).children()
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + GONE_S
        while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.01)
