"""The lock over a shared dictionary: one holder at a time, heirs of the dead, no clock but one's own."""

from __future__ import annotations

import re
import threading
import time
from typing import Any

import pytest

from service.weights.dict_lock import DictLock, Value

NAME = "org/mine"


class Shared:
    """What `modal.Dict` does for the lock; each call is atomic."""

    def __init__(self) -> None:
        self.entries: dict[str, Value] = {}
        self.fails = False
        self._lock = threading.Lock()

    def put(self, key: str, value: Value, *, skip_if_exists: bool = False) -> bool:
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


def lock(shared: Shared, silence_s: float = 5.0, **callbacks: Any) -> DictLock:
    """Return a lock that is quick about everything."""
    return DictLock(lambda: shared, beat_s=0.02, silence_s=silence_s, look_s=0.005, **callbacks)


def test_lock_is_given_back(shared: Shared) -> None:
    """After the block anybody may have it, however the block ended."""
    with lock(shared).held(NAME):
        assert list(shared.entries) == [NAME]
    assert shared.entries == {}
    with pytest.raises(ZeroDivisionError), lock(shared).held(NAME):
        _ = 1 / 0
    assert shared.entries == {}


def test_lock_opens_its_dictionary_only_when_it_is_wanted() -> None:
    """A boot that finds its weights asks nothing of Modal."""
    DictLock(lambda: pytest.fail("it was opened"))


def test_lock_reloads_before_and_commits_before_it_is_given_back(shared: Shared) -> None:
    """Who is next must see what was done; also what was finished before an error."""
    order: list[str] = []
    there = lambda: "held" if NAME in shared.entries else "free"  # noqa: E731 - said in one line
    used = lock(
        shared,
        on_held=lambda: order.append(f"reload {there()}"),
        before_release=lambda: order.append(f"commit {there()}"),
    )
    with used.held(NAME):
        order.append("work")
    with pytest.raises(KeyError), used.held(NAME):
        raise KeyError

    assert order == ["reload held", "work", "commit held", "reload held", "commit held"]


def test_lock_tells_of_the_blocks_error_rather_than_of_a_commit_that_failed_too(shared: Shared) -> None:
    """A full volume: the sentence with the figures is the one that helps."""
    used = lock(shared, before_release=lambda: (_ for _ in ()).throw(OSError("commit")))
    with pytest.raises(ValueError, match="the reason"), used.held(NAME):
        raise ValueError("the reason")
    with pytest.raises(OSError, match="commit"), used.held(NAME):
        pass
    assert shared.entries == {}


def test_lock_whose_reload_fails_is_given_back(shared: Shared) -> None:
    """Nobody else waits a minute for it."""
    used = lock(shared, on_held=lambda: (_ for _ in ()).throw(OSError("reload")))
    with pytest.raises(OSError, match="reload"), used.held(NAME):
        pytest.fail("the block ran")
    assert shared.entries == {}


def test_lock_lets_one_in_at_a_time(shared: Shared) -> None:
    """Of many that want it none sees another inside."""
    inside, most, said = [0], [0], []

    def work() -> None:
        with lock(shared).held(NAME, said.append):
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
    assert 1 <= len(said) <= 7
    assert set(said) == {f"Another container has {NAME}; waiting until it is done or gone."}
    assert shared.entries == {}


def test_lock_of_another_name_waits_for_nobody(shared: Shared) -> None:
    """Two models are fetched at once."""
    with lock(shared).held(NAME), lock(shared).held("org/other"):
        assert len(shared.entries) == 2


def test_lock_of_a_holder_that_lives_is_never_taken(shared: Shared) -> None:
    """However long it takes: each beat counts anew."""
    got = threading.Event()

    def wait() -> None:
        with lock(shared, silence_s=2.0).held(NAME):
            got.set()

    with lock(shared).held(NAME):
        waiting = threading.Thread(target=wait)
        waiting.start()
        assert not got.wait(3.0)
    assert got.wait(5)
    waiting.join()


def test_lock_of_a_dead_holder_is_inherited_after_its_silence(shared: Shared) -> None:
    """Measured with the clock of who waits: what time the dead one thought it was plays no part."""
    shared.put(NAME, ("dead", 7))
    said: list[str] = []
    began = time.monotonic()
    with lock(shared, silence_s=0.2).held(NAME, said.append):
        assert time.monotonic() - began >= 0.2
        assert shared.entries[NAME][0] != "dead"
    assert NAME not in shared.entries
    assert re.fullmatch(rf"Who had {re.escape(NAME)} has been silent for \d+ s; going on in its place\.", said[-1])


def test_lock_of_a_dead_holder_has_one_heir(shared: Shared) -> None:
    """Of many that wait one goes on, and the others wait for it."""
    shared.put(NAME, ("dead", 7))
    inside, most, done = [0], [0], []

    def work() -> None:
        with lock(shared, silence_s=2.0).held(NAME):
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


def test_lock_whose_heir_died_on_the_way_has_another(shared: Shared) -> None:
    """It had claimed the inheritance and not entered upon it."""
    shared.put(NAME, ("dead", 7))
    shared.put(f"{NAME} after dead 7 1", ("dead too", 0))
    with lock(shared, silence_s=0.1).held(NAME):
        assert shared.entries[NAME][0] not in {"dead", "dead too"}


def test_lock_of_a_holder_that_had_an_heir_is_not_taken_from_that_one(shared: Shared) -> None:
    """A holder that was only asleep leaves the heir's entry alone, in its beats and at its end."""
    with lock(shared).held(NAME):
        shared.put(NAME, ("heir", 1))
        time.sleep(0.1)
        assert shared.entries[NAME] == ("heir", 1)
    assert shared.entries[NAME] == ("heir", 1)


def test_lock_goes_on_beating_after_a_beat_that_failed(shared: Shared) -> None:
    """An outage of Modal's of less than the silence costs nothing."""
    with lock(shared).held(NAME):
        shared.fails = True
        time.sleep(0.06)
        shared.fails = False
        before = shared.entries[NAME]
        deadline = time.monotonic() + 5
        while shared.entries[NAME] == before and time.monotonic() < deadline:
            time.sleep(0.005)
        assert shared.entries[NAME][1] > before[1]
