"""A lock that reaches from container to container, kept in a dictionary that all of them see (`modal.Dict`).

The value of a key is its holder and a beat that the holder raises. No two clocks are compared: who waits measures with
its own how long a beat has stood still, and takes over from a holder that has been silent for too long. What is
asked of the dictionary is `put` that may leave an existing value alone, `get` and `pop`, each of which is atomic.

It saves work and nothing hangs on it: a holder that was only asleep, and wakes beside its heir, fetches what the heir
fetches too, under names of its own until a file is whole.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

SILENCE_S = float(os.environ.get("LOCK_SILENCE_S", "60"))  # tests of a dead holder have less time
BEAT_S = SILENCE_S / 6
_LOOK_S = 0.5  # a look is a round trip to Modal, and what is waited for takes minutes

Value = tuple[str, int]  # holder, beat


class Store(Protocol):
    """What the lock needs of `modal.Dict`."""

    def put(self, key: str, value: Value, *, skip_if_exists: bool = False) -> bool:
        """Store a value; True unless one was there and was to be left alone."""

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value."""

    def pop(self, key: str, default: Any = None) -> Any:
        """Remove and return the value."""


class DictLock:
    """Keeps containers from fetching one repository at once; `service.weights.locks.Lock` is what it is.

    Args:
        store: The dictionary, or what opens it: a boot that has its weights must not wait for one.
        on_held: Called when the lock is got: sees what others have left, such as a volume's `reload`.
        before_release: Called before it is given back, however the block ended: shows others what was done.
        beat_s: How often a holder says that it lives.
        silence_s: After how long without a word a holder is taken for dead.
        look_s: How often who waits looks.
    """

    def __init__(
        self,
        store: Callable[[], Store],
        *,
        on_held: Callable[[], None] = lambda: None,
        before_release: Callable[[], None] = lambda: None,
        beat_s: float = BEAT_S,
        silence_s: float = SILENCE_S,
        look_s: float = _LOOK_S,
    ) -> None:
        self._open, self._on_held, self._before_release = store, on_held, before_release
        self._beat_s, self._silence_s, self._look_s = beat_s, silence_s, look_s

    @contextmanager
    def held(self, name: str, say: Callable[[str], None] = lambda _: None) -> Iterator[None]:
        """Wait until nobody else has `name`, and keep it while the block lasts.

        Args:
            name: A repository's, or whatever is to be one's alone.
            say: Called with a sentence when another has it, and when that one is taken for dead.
        """
        store, me = self._open(), uuid.uuid4().hex
        self._take(store, name, me, say)
        ended = threading.Event()
        beats = threading.Thread(target=self._beat, args=(store, name, me, ended), name="lock-beats", daemon=True)
        beats.start()
        try:
            self._on_held()
            try:
                yield
            except BaseException:
                with suppress(Exception):  # what went wrong in the block is what is told
                    self._before_release()
                raise
            self._before_release()
        finally:
            ended.set()
            beats.join()
            if _holder(store.get(name)) == me:
                store.pop(name, None)

    def _take(self, store: Store, name: str, me: str, say: Callable[[str], None]) -> None:
        seen, since, heirs, told = None, 0.0, 0, False
        while not store.put(name, (me, 0), skip_if_exists=True):
            value, now = store.get(name), time.monotonic()
            if value is None:  # given back just now
                continue
            if not told:
                say(f"Another container has {name}; waiting until it is done or gone.")
                told = True
            if value != seen:
                seen, since, heirs = value, now, 0
            elif now - since > self._silence_s * (heirs + 1):
                heirs += 1
                if self._inherit(store, name, value, heirs, me):
                    say(f"Who had {name} has been silent for {now - since:.0f} s; going on in its place.")
                    return
            time.sleep(self._look_s)

    def _inherit(self, store: Store, name: str, dead: Value, heir: int, me: str) -> bool:
        """Become the one heir of a dead holder, unless another is; an heir that dies on the way has heirs too.

        The will stays: it names a holder that will not be there again. Modal forgets it after a week.
        """
        if not store.put(f"{name} after {dead[0]} {dead[1]} {heir}", (me, 0), skip_if_exists=True):
            return False
        if store.get(name) != dead:  # it lives after all, or gave the lock back
            return False
        store.put(name, (me, 0))
        return True

    def _beat(self, store: Store, name: str, me: str, ended: threading.Event) -> None:
        beat = 0
        while not ended.wait(self._beat_s):
            beat += 1
            try:
                if _holder(store.get(name)) != me:  # an heir has it
                    return
                store.put(name, (me, beat))
            except Exception:  # noqa: BLE001, S112 - the client has tried again already; the next beat makes up for it
                continue


def _holder(value: Value | None) -> str | None:
    return value[0] if value else None
