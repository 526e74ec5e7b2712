"""Serialises downloads per repository: a second process or container waits, and reuses the result.

`Lock` is the protocol, `LocalLock` serialises the processes of one machine, `Lease` containers that share a store.

On Modal each container sees a volume as it was at its start or last `reload`, and others see its files after its
`commit`; files are named by content and manifests written last, so two replicas of one cold model that both download
are correct, and each pays the whole download, minutes of GPU time for a large model. The lease saves exactly that: a
holder that was suspended and wakes up beside its successor only downloads what the successor downloads too. A
holder that must not work beside a successor asks `Tenure.is_certain` as long as it works.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol

from service.errors import WeightsError
from service.weights import hub_cache

_log = logging.getLogger(__name__)

# Network file systems without locks. The hub's client is correct without them: two only download the same twice.
NO_LOCKS = {errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK}
EXPIRY_S = 60.0
_POLL_S = 0.5  # a poll is a round trip to Modal, and what is waited for takes minutes


class Lock(Protocol):
    """Keeps others from working on the same repository."""

    def held(self, name: str) -> AbstractContextManager[object]:
        """Wait for the lock of that name, usually a hub id, and hold it while the block lasts; log when waiting."""


class LocalLock:
    """A lock file in the hub cache; the kernel releases it with its holder, however that ends."""

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Wait until no other process of this machine holds it."""
        from filelock import FileLock, Timeout  # noqa: PLC0415 - 23 ms; complete weights need no lock

        file = hub_cache.locks(name) / "vllm-service.lock"
        lock = FileLock(file, fallback_to_soft=False)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                _log.info("Another process is fetching %s; waiting until it has finished or ended.", name)
                lock.acquire()
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise WeightsError(
                    f"The cache '{hub_cache.hub_cache()}' cannot be written: {error.strerror}.",
                    hint="Point HF_HOME at one that can.",
                ) from error
        try:
            yield
        finally:
            lock.release()


LeaseValue = tuple[str, int]  # holder, number of renewals


class LeaseStore(Protocol):
    """What a lease needs of `modal.Dict`; each call is atomic."""

    def put(self, key: str, value: LeaseValue, *, skip_if_exists: bool = False) -> bool:
        """Store a value; False if one exists and was to be kept."""

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value."""

    def pop(self, key: str, default: Any = None) -> Any:
        """Remove and return a value."""


class Tenure:
    """How long a holder can be certain that it still holds its lease.

    Args:
        expiry_s: After how long without a renewal others may replace it.
    """

    def __init__(self, expiry_s: float) -> None:
        self._sure_s = expiry_s * 5 / 6  # others measure from when they saw the last renewal, which is later
        self._renewed_at = time.monotonic()
        self._is_over = False

    @property
    def is_certain(self) -> bool:
        """Whether nobody can have replaced it."""
        return not self._is_over and time.monotonic() - self._renewed_at < self._sure_s

    def renewed(self, at: float) -> None:
        """Take note of a renewal that was begun at this time."""
        self._renewed_at = at

    def end(self) -> None:
        """Take note that another holder was seen."""
        self._is_over = True


class Lease:
    """A lock with a holder and an expiry, in a store that all containers see.

    The holder renews its lease. One that is not renewed for `expiry_s` has expired, by the clock of the container that
    waits (clocks of two containers are never compared), and a waiting container replaces the holder.

    Args:
        store: Opens the store: a boot whose weights are complete must not wait for one.
        on_acquired: Called when the lease is held, such as a volume's `reload`: shows what others have committed.
        before_release: Called before it is released, also after an error: shows others what was done.
        expiry_s: After how long without a renewal a lease expires; it is renewed six times in that time.
        poll_s: How often a waiting container looks.
    """

    def __init__(
        self,
        store: Callable[[], LeaseStore],
        *,
        on_acquired: Callable[[], None] = lambda: None,
        before_release: Callable[[], None] = lambda: None,
        expiry_s: float = EXPIRY_S,
        poll_s: float = _POLL_S,
    ) -> None:
        self._open, self._on_acquired, self._before_release = store, on_acquired, before_release
        self._expiry_s, self._poll_s = expiry_s, poll_s

    @contextmanager
    def held(self, name: str) -> Iterator[Tenure]:
        """Wait until no other container holds the lease of that name, and hold it while the block lasts."""
        store, holder, released = self._open(), uuid.uuid4().hex, threading.Event()
        renewals = None
        try:
            self._acquire(store, name, holder)  # an interrupt may come when the store has it already
            tenure = Tenure(self._expiry_s)
            renewals = threading.Thread(target=self._renew, args=(store, name, holder, released, tenure), daemon=True)
            renewals.start()
            self._on_acquired()
            try:
                yield tenure
            except BaseException:
                with suppress(Exception):  # the block's own error is the one to report
                    self._before_release()
                raise
            self._before_release()
        finally:
            released.set()
            if renewals and renewals.ident:
                renewals.join()
            if _holder(store.get(name)) == holder:
                store.pop(name, None)

    def _acquire(self, store: LeaseStore, name: str, holder: str, *, logged: bool = False) -> None:
        seen, since = None, 0.0
        while not store.put(name, (holder, 0), skip_if_exists=True):
            lease, now = store.get(name), time.monotonic()
            if lease is None:  # released just now
                continue
            if not logged:
                _log.info("Another container holds %s; waiting until it has finished or its lease expires.", name)
                logged = True
            if lease != seen:
                seen, since = lease, now
            elif now - since > self._expiry_s and self._replace(store, name, lease, holder):
                _log.warning("The holder of %s has not renewed its lease for %.0f s; replacing it.", name, now - since)
                return
            time.sleep(self._poll_s)

    def _replace(self, store: LeaseStore, name: str, expired: LeaseValue, holder: str) -> bool:
        """Replace an expired lease, unless another container has. One does so at a time: that takes a lease itself."""
        replacing = f"{name} of {expired[0]}"
        self._acquire(store, replacing, holder, logged=True)
        try:
            if store.get(name) != expired:  # renewed, released, or replaced
                return False
            store.put(name, (holder, 0))
            return True
        finally:
            store.pop(replacing, None)

    def _renew(self, store: LeaseStore, name: str, holder: str, released: threading.Event, tenure: Tenure) -> None:
        renewals = 0
        while not released.wait(self._expiry_s / 6):
            renewals, began = renewals + 1, time.monotonic()
            with suppress(Exception):  # the client has tried again already; the next renewal makes up for it
                if _holder(store.get(name)) != holder:  # it expired and was replaced
                    tenure.end()
                    return
                store.put(name, (holder, renewals))
                tenure.renewed(began)


def _holder(lease: LeaseValue | None) -> str | None:
    return lease[0] if lease else None
