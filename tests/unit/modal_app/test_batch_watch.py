"""The function that keeps the gateway up while a batch runs."""

from __future__ import annotations

import time
from pathlib import Path

import httpx2
import pytest
from grpclib.exceptions import StreamTerminatedError

from service.batch.store import Batch, ClientStore, Status, Store
from service.modal_app import batch_watch

NOW = time.time()


def saved(store: ClientStore, status: Status) -> Batch:
    """Keep a batch of this status, which has an hour."""
    batch = Batch(
        id="batch_1",
        endpoint="/v1/completions",
        input_file_id="file-1",
        completion_window="1h",
        created_at=int(NOW),
        expires_at=int(NOW) + 3600,
        output_id="file-2",
        error_id="file-3",
        status=status,
    )
    store.save_batch(batch)
    return batch


def test_gateway_is_asked_until_the_batch_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it does not answer, or the volume cannot be reloaded; the batch's end is its status."""
    store, asked, reloads = Store(tmp_path), [], []
    saved(store.of("alice"), "in_progress")

    def get(url: str, **_: object) -> None:
        asked.append(url)
        if len(asked) == 2:
            raise httpx2.ConnectError("no")
        if len(asked) == 3:
            saved(store.of("alice"), "completed")

    def reload() -> None:
        reloads.append(1)
        if len(reloads) < 3:
            raise [OSError("open files"), StreamTerminatedError("Connection lost")][len(reloads) - 1]

    monkeypatch.setattr(batch_watch.httpx2, "get", get)
    pauses: list[float] = []
    status = batch_watch.watch(store, "alice", "", "batch_1", "http://gateway", reload=reload, pause=pauses.append)

    assert status == "completed"
    assert asked == ["http://gateway/health"] * 3
    assert len(pauses) == 3


def test_watch_ends_with_the_window_of_a_batch_that_nobody_drives(tmp_path: Path) -> None:
    """And with a batch that was removed."""
    store = Store(tmp_path)
    saved(store.of("alice"), "in_progress")
    clock = lambda: NOW + 7200.0  # noqa: E731 - one line

    assert batch_watch.watch(store, "alice", "", "batch_1", "", reload=lambda: None, clock=clock) == "in_progress"
    assert batch_watch.watch(store, "bob", "", "batch_1", "", reload=lambda: None) == "deleted"
