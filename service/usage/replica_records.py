"""A replica's part of the volume: when it started, got ready and was last alive, and what aborted requests used."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from service.usage.records import UsageRecord
from service.usage.writer_files import INTERVAL_S, ReplicaRecord, Segments, write_record

_log = logging.getLogger(__name__)
_START_TICKS = 19  # of the fields of /proc/<pid>/stat that follow the name: proc(5)


def process_started_at() -> float:
    """Return when this process began, in seconds since 1970, or now where the system does not tell.

    A container is paid from then on: until its program is imported it takes a second or two, or ten on a busy machine.
    """
    now = time.time()
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[_START_TICKS])
        return now - max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return now


class ReplicaRecorder:
    """Writes on a thread of its own, from its construction to `close`; a volume that fails harms no request.

    Args:
        directory: That of all usage on the volume.
        commit: Makes files visible to others; blocks.
        record: The replica, as it starts.
        interval_s: Between two commits.
    """

    def __init__(
        self, directory: Path, commit: Callable[[], None], record: ReplicaRecord, interval_s: float = INTERVAL_S
    ) -> None:
        self._directory, self._commit, self._interval_s = directory, commit, interval_s
        self._record, self._segments = record, Segments(directory, record.id)
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="usage-replica", daemon=True)
        self._thread.start()

    def mark_ready(self) -> None:
        """Note that its wake has ended."""
        with self._lock:
            self._record = replace(self._record, ready_at=time.time())

    def add(self, record: UsageRecord) -> None:
        """Take what an aborted request used; from any thread."""
        with self._lock:
            self._segments.add([record])

    def close(self, timeout_s: float = 5.0) -> None:
        """Write the end of the replica. Blocks."""
        self._ending.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        self._write()
        while not self._ending.wait(self._interval_s):
            self._write()
        self._write(is_last=True)

    def _write(self, *, is_last: bool = False) -> None:
        now = time.time()
        try:
            with self._lock:
                self._record = replace(self._record, alive_at=now, ended_at=now if is_last else None)
                write_record(self._directory, self._record)
                self._segments.write(closing=is_last)
            self._commit()
        except Exception as error:  # noqa: BLE001 - a full volume, or Modal's client; the next interval tries again
            _log.warning("The usage of replica %s was not written: %s", self._record.id, error)
