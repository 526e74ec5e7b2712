"""What an upload shows of its progress; and an interrupt whose cancellation the client swallows."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from typing import Any

import pytest

from service.modal_app import upload
from service.weights.manifest import File
from service.weights.progress import Progress


class Stubborn:
    """An upload that goes on after a cancellation, as the client does where one comes as a call ends."""

    def __init__(self) -> None:
        self.cancelled = 0
        self.begun = threading.Event()
        self.block: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Stubborn:
        return self

    def put_file(self, *_: Any, **__: Any) -> None:
        """Take a file."""

    async def __aexit__(self, *_: object) -> None:
        self.block = asyncio.create_task(asyncio.sleep(60))
        self.begun.set()
        for _ in range(2):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled += 1
                if self.cancelled == 2:
                    raise


class FakeVolume:
    """A volume without Modal."""

    object_id, _client = "vo-1", None

    async def hydrate(self) -> FakeVolume:
        """Return itself."""
        return self

    def _get_metadata(self) -> None:
        return None


def test_interrupt_ends_an_upload_whose_client_swallows_the_first_cancellation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is cancelled again, and so are the transfers that it leaves behind."""
    sending = Stubborn()
    monkeypatch.setattr(upload._Volume, "from_name", lambda _: FakeVolume())
    monkeypatch.setattr(upload._AbstractVolumeUploadContextManager, "resolve", lambda *_, **__: sending)

    def interrupt() -> None:
        sending.begun.wait(10)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt).start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            upload._put("huggingface-cache", [], lambda **_: None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 20
    assert sending.cancelled == 2
    assert sending.block
    assert sending.block.cancelled()


def test_progress_of_an_upload_counts_bytes_of_all_files() -> None:
    """Those of an attempt that failed are taken back, and what was on the volume already counts with its file."""
    shown: list[Progress] = []
    sent = upload._Sent("bot", {"a": File(10, "sha256:a"), "b": File(30, "sha256:b")}, shown.append)
    sent.count(advance=6.0)
    sent.count(advance=-6.0)
    sent.count(advance=10.0)
    sent.finish(["a"])
    sent.finish(["b"])
    assert [one.done_bytes for one in shown] == [6, 0, 10, 10, 40]
    assert shown[-1] == Progress("bot", 40, 40, 2, 2, "uploading")
    assert sent.sent_bytes == 10
