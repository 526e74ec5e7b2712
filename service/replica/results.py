"""Saves the results of a boot: its record, and what it compiled. None of it may fail a replica."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from service.boots import records
from service.boots.failures import is_permanent
from service.boots.records import BootRecord
from service.errors import ServiceError
from service.replica.plan import Plan

_log = logging.getLogger(__name__)


class BootResults:
    """Takes the results of one replica's boot.

    Args:
        plan: Where records and caches are.
        on_record: Called with the record.
        commit_caches: Makes records and caches visible to other replicas.
    """

    def __init__(self, plan: Plan, on_record: Callable[[BootRecord], None], commit_caches: Callable[[], None]) -> None:
        self._plan, self._on_record, self._commit_caches = plan, on_record, commit_caches
        self._thread: threading.Thread | None = None

    def save(self, record: BootRecord) -> None:
        """Hand the record over, and write it into the directory of records; a boot that worked clears the failure."""
        _logging_failure(lambda: self._on_record(record))
        if directory := self._plan.records:
            _logging_failure(lambda: records.keep(record, directory))
        if self._plan.failure and record.outcome != "failed":
            self._plan.failure.clear()

    def save_failure(self, gpu: str, error: BaseException) -> None:
        """Record a boot that failed, where the same boot would fail again."""
        if (failure := self._plan.failure) and isinstance(error, ServiceError) and is_permanent(error):
            _logging_failure(lambda: failure.save(self._plan.spec.key, gpu, error))

    def commit(self) -> None:
        """Make what was saved visible to other replicas."""
        _logging_failure(self._commit_caches)

    def publish_caches(self, *, compiled: bool) -> None:
        """Save what a boot compiled to the volumes, and commit them; on a thread.

        Only now: no checkpoint follows that could see a volume's file open.
        """
        self._thread = threading.Thread(target=self._publish, args=(compiled,), name="boot-results", daemon=True)
        self._thread.start()

    def flush(self, timeout_s: float) -> None:
        """Save what the requests have compiled, at the end of a replica; Modal commits its volumes after that."""
        if self._thread is None:
            return
        self._thread.join(timeout_s)
        if self._plan.caches and not self._thread.is_alive():
            self._plan.caches.save()

    def _publish(self, compiled: bool) -> None:
        if self._plan.caches and compiled:
            self._plan.caches.save()
        self.commit()


def _logging_failure(call: Callable[[], object]) -> None:
    try:
        call()
    except Exception as error:  # noqa: BLE001 - a full disk, Modal's client, an observer that raises
        _log.warning("The results of this boot were not saved everywhere: %s", error)
