"""What comes after a boot: its record is told and kept, what it compiled is handed on. None of it fails a replica."""

from __future__ import annotations

import threading
from collections.abc import Callable

from service.boots import records
from service.boots.records import BootRecord
from service.replica.plan import Plan


class Afterwards:
    """Takes the results of one replica's boot.

    Args:
        plan: Where records and caches are.
        on_record: Called with the record.
        persist: Makes records and caches seen by other replicas.
        say: Called with a sentence when something was not kept.
    """

    def __init__(
        self,
        plan: Plan,
        on_record: Callable[[BootRecord], None],
        persist: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self._plan, self._on_record, self._persist, self._say = plan, on_record, persist, say
        self._thread: threading.Thread | None = None

    def keep(self, record: BootRecord) -> None:
        """Tell the record, and write it into the directory of records."""
        self._quietly(lambda: self._on_record(record))
        if directory := self._plan.records:
            self._quietly(lambda: records.keep(record, directory))

    def persist(self) -> None:
        """Let others see what was kept."""
        self._quietly(self._persist)

    def hand_on(self, *, compiled: bool) -> None:
        """Copy what a boot compiled to the volumes, and persist; on a thread.

        Only now: no checkpoint comes any more that could see a volume's file open.
        """
        self._thread = threading.Thread(target=self._hand_on, args=(compiled,), name="boot-afterwards", daemon=True)
        self._thread.start()

    def finish(self, timeout_s: float) -> None:
        """Copy what the requests have compiled, at the end of a replica; Modal commits its volumes after that."""
        if self._thread is None:
            return
        self._thread.join(timeout_s)
        if self._plan.caches and not self._thread.is_alive():
            self._plan.caches.copy_out()

    def _hand_on(self, compiled: bool) -> None:
        if self._plan.caches and compiled:
            self._plan.caches.copy_out()
        self.persist()

    def _quietly(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - a full disk, Modal's client, whoever takes the record
            self._say(f"What this boot took is not kept everywhere: {error}")
