"""The lease across containers: one holder at a time, replaced when it expires by the waiting one's own clock."""

from __future__ import annotations

import errno
import fcntl
import logging
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from service.errors import WeightsError
from service.weights.locks import Lease, LeaseValue, LocalLock

NAME = "org/mine"


class Shared:
    """What `modal.Dict` does for a lease; each call is atomic."""

    def __init__(self) -> None:
        self.entries: dict[str, LeaseValue] = {}
        self.fails = False
        self._lock = threading.Lock()

    def put(self, key: str, value: LeaseValue, *, skip_if_exists: bool = False) -> bool:
        """Store a value, unless one is there and is to be left alone."""
        self._check()
        with self._lock:
            if skip_if_exists and key in self.entries:
                return False
            self.entries[key] = value
            return True

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value."""
        self._check()
        return self.entries.get(key, default)

    def pop(self, key: str, default: Any = None) -> Any:
        """Remove a value."""
        self._check()
        with self._lock:
            return self.entries.pop(key, default)

    def _check(self) -> None:
        if self.fails:
            raise ConnectionError("Modal does not answer")


@pytest.fixture
def shared() -> Shared:
    """An empty dictionary."""
    return Shared()


def lease(shared: Shared, expiry_s: float = 5.0, **callbacks: Any) -> Lease:
    """Return a lease that is polled often."""
    return Lease(lambda: shared, expiry_s=expiry_s, poll_s=0.005, **callbacks)


def test_lease_is_released_after_the_block(shared: Shared) -> None:
    """Whether the block ended well or with an error."""
    with lease(shared).held(NAME):
        assert list(shared.entries) == [NAME]
    assert shared.entries == {}
    with pytest.raises(ZeroDivisionError), lease(shared).held(NAME):
        _ = 1 / 0
    assert shared.entries == {}


def test_lease_opens_its_store_only_when_it_is_acquired() -> None:
    """A boot whose weights are complete asks nothing of Modal."""
    Lease(lambda: pytest.fail("it was opened"))


def test_lease_calls_back_while_it_is_held(shared: Shared) -> None:
    """The volume is reloaded after it is acquired, and committed before it is released, also after an error."""
    order: list[str] = []
    there = lambda: "held" if NAME in shared.entries else "free"  # noqa: E731 - said in one line
    used = lease(
        shared,
        on_acquired=lambda: order.append(f"reload {there()}"),
        before_release=lambda: order.append(f"commit {there()}"),
    )
    with used.held(NAME):
        order.append("work")
    with pytest.raises(KeyError), used.held(NAME):
        raise KeyError

    assert order == ["reload held", "work", "commit held", "reload held", "commit held"]


def test_lease_raises_the_error_of_the_block_rather_than_of_the_commit(shared: Shared) -> None:
    """On a full volume both fail, and the error of the block has the figures."""
    used = lease(shared, before_release=lambda: (_ for _ in ()).throw(OSError("commit")))
    with pytest.raises(ValueError, match="the reason"), used.held(NAME):
        raise ValueError("the reason")
    with pytest.raises(OSError, match="commit"), used.held(NAME):
        pass
    assert shared.entries == {}


def test_lease_whose_reload_fails_is_released(shared: Shared) -> None:
    """No other container waits a minute for its expiry."""
    used = lease(shared, on_acquired=lambda: (_ for _ in ()).throw(OSError("reload")))
    with pytest.raises(OSError, match="reload"), used.held(NAME):
        pytest.fail("the block ran")
    assert shared.entries == {}


def test_lease_has_one_holder_at_a_time(shared: Shared, caplog: pytest.LogCaptureFixture) -> None:
    """Of eight threads that acquire it, never two hold it; each that waits logs it once."""
    caplog.set_level(logging.INFO)
    inside, most = [0], [0]

    def work() -> None:
        with lease(shared).held(NAME):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.01)
            inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    assert most == [1]
    assert 1 <= len(caplog.messages) <= 7
    waiting = f"Another container holds {NAME}; waiting until it has finished or its lease expires."
    assert set(caplog.messages) == {waiting}
    assert shared.entries == {}


def test_leases_of_two_names_are_independent(shared: Shared) -> None:
    """Two models are fetched at once."""
    with lease(shared).held(NAME), lease(shared).held("org/other"):
        assert len(shared.entries) == 2


def test_lease_that_is_renewed_does_not_expire(shared: Shared) -> None:
    """However long it is held: each renewal starts the time anew."""
    got = threading.Event()

    def wait() -> None:
        with lease(shared, expiry_s=2.0).held(NAME):
            got.set()

    with lease(shared).held(NAME):
        waiting = threading.Thread(target=wait)
        waiting.start()
        assert not got.wait(3.0)
    assert got.wait(5)
    waiting.join()


def test_lease_of_a_dead_holder_is_replaced_when_it_expires(shared: Shared, caplog: pytest.LogCaptureFixture) -> None:
    """The waiting container measures the time with its own clock."""
    shared.put(NAME, ("dead", 7))
    began = time.monotonic()
    with lease(shared, expiry_s=0.2).held(NAME):
        assert time.monotonic() - began >= 0.2
        assert shared.entries[NAME][0] != "dead"
    assert NAME not in shared.entries
    assert re.fullmatch(
        rf"The holder of {re.escape(NAME)} has not renewed its lease for \d+ s; replacing it\.", caplog.messages[-1]
    )


def test_lease_of_a_dead_holder_has_one_successor(shared: Shared) -> None:
    """Of six that wait one replaces the holder, and the others wait for that one."""
    shared.put(NAME, ("dead", 7))
    inside, most, done = [0], [0], []

    def work() -> None:
        with lease(shared, expiry_s=2.0).held(NAME):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.02)
            inside[0] -= 1
        done.append(True)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    assert (most, len(done)) == ([1], 6)


def test_lease_whose_successor_died_while_replacing_has_another(shared: Shared) -> None:
    """The lease on the replacement expires too."""
    shared.put(NAME, ("dead", 7))
    shared.put(f"{NAME} of dead", ("dead too", 0))
    with lease(shared, expiry_s=0.1).held(NAME):
        assert shared.entries[NAME][0] not in {"dead", "dead too"}


def test_lease_that_was_replaced_is_neither_renewed_nor_released(shared: Shared) -> None:
    """A holder that was only suspended leaves its successor's lease alone."""
    with lease(shared, expiry_s=0.12).held(NAME):
        shared.put(NAME, ("successor", 1))
        time.sleep(0.1)
        assert shared.entries[NAME] == ("successor", 1)
    assert shared.entries[NAME] == ("successor", 1)


def test_lease_is_renewed_after_a_renewal_that_failed(shared: Shared) -> None:
    """An outage of Modal that is shorter than the expiry costs nothing."""
    with lease(shared, expiry_s=0.12).held(NAME):
        shared.fails = True
        time.sleep(0.06)
        shared.fails = False
        before = shared.entries[NAME]
        deadline = time.monotonic() + 5
        while shared.entries[NAME] == before and time.monotonic() < deadline:
            time.sleep(0.005)
        assert shared.entries[NAME][1] > before[1]


def test_local_lock_in_a_cache_that_cannot_be_written_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the directory and the variable to set."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))

    with pytest.raises(WeightsError, match=r"file/hub' cannot be written: .*Point HF_HOME"):
        LocalLock().held("o/m").__enter__()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_local_lock_on_a_file_system_without_locks_is_not_waited_for(
    cache: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A network file system may have none; two processes then only download the same twice."""

    def flock(*_: object) -> None:
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    with LocalLock().held("org/mine"), LocalLock().held("org/mine"):
        pass
