"""Bodies of requests: how slowly they may arrive, and how many bytes of them the gateway holds."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import Any, Self

from service.in_engine.vllm_service.api_error import APIError, Message, Receive
from service.in_engine.vllm_service.http_contract import BODY_LIMIT, MIB


@dataclass(frozen=True)
class UploadLimits:
    """What clients may take.

    Attributes:
        piece_s: Seconds until the first piece of a body, and between two pieces.
        bytes_per_s: Least rate of a whole body, after its first `piece_s`; one of the size limit takes 69 minutes at
            most.
        key_bytes: Bytes that are held of the bodies of one key.
        all_bytes: Bytes that are held of the bodies of all keys.
        sweep_s: Seconds between two looks at what is overdue.
    """

    piece_s: float = 30.0
    bytes_per_s: float = 8 * 1024
    key_bytes: int = 16 * BODY_LIMIT
    all_bytes: int = 32 * BODY_LIMIT
    sweep_s: float = 1.0


class Uploads:
    """All bodies that the gateway holds.

    Args:
        limits: What clients may take.
    """

    def __init__(self, limits: UploadLimits | None = None) -> None:
        self.limits = limits or UploadLimits()
        self.held: Counter[str] = Counter()  # bytes by key
        self.waiting: set[Upload] = set()
        self._sweep: asyncio.TimerHandle | None = None

    def track(self, key: str) -> Upload:
        """Return a context that counts the body of a request of this key, at most until it exits."""
        return Upload(self, key)

    def wait(self, upload: Upload) -> None:
        """Look after an upload that waits; one timer serves all, since nearly every body is there at once."""
        self.waiting.add(upload)
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(self.limits.sweep_s, self._end_overdue)

    def _end_overdue(self) -> None:
        loop, self._sweep = asyncio.get_running_loop(), None
        for upload in [*self.waiting]:
            upload.end_if_overdue(loop.time())
        if self.waiting:
            self._sweep = loop.call_later(self.limits.sweep_s, self._end_overdue)


class Upload:
    """One body.

    Args:
        uploads: All of them.
        key: Name of the API client's key.
    """

    def __init__(self, uploads: Uploads, key: str) -> None:
        self._uploads, self._key = uploads, key
        self._held = self._arrived = 0
        self._began = self._waits_since = 0.0
        self._task: asyncio.Task[Any] | None = None
        self._is_overdue = False

    def __enter__(self) -> Self:
        """Begin to count."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop counting."""
        self.release()

    async def receive(self, receive: Receive) -> Message:
        """Receive the next piece.

        Raises:
            APIError: 408: it did not arrive in time.
        """
        self._task = task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine of a server runs in one
        self._waits_since = asyncio.get_running_loop().time()
        self._began = self._began or self._waits_since
        self._uploads.wait(self)
        try:
            message = await receive()
        except asyncio.CancelledError:
            if self._is_overdue and task.uncancel() == 0:
                raise self._too_slow() from None
            raise
        finally:
            self._uploads.waiting.discard(self)
        self._arrived += len(message.get("body", b""))
        return message

    def end_if_overdue(self, now: float) -> None:
        """Stop waiting for a piece that takes too long."""
        limits = self._uploads.limits
        whole_end = self._began + limits.piece_s + self._arrived / limits.bytes_per_s
        if now > min(self._waits_since + limits.piece_s, whole_end) and self._task:
            self._is_overdue = True
            self._uploads.waiting.discard(self)
            self._task.cancel()

    def _too_slow(self) -> APIError:
        limits = self._uploads.limits
        return APIError(
            408,
            f"The body is incomplete: {self._arrived} bytes of it arrived. Each piece must arrive within "
            f"{limits.piece_s:g} s, and the whole at {limits.bytes_per_s:g} bytes/s or faster. Send it again.",
            code="body_too_slow",
        )

    def hold(self, size: int) -> None:
        """Count that so many bytes are held now.

        Raises:
            APIError: 429 or 503: they are too many, of this key or in all.
        """
        held, limits = self._uploads.held, self._uploads.limits
        held[self._key] += size - self._held
        self._held = size
        if held[self._key] > limits.key_bytes:
            message = (
                f"The key '{self._key}' has more than {limits.key_bytes // MIB} MiB of bodies in requests in flight."
            )
            raise APIError(429, f"{message} Try again in 1 s.", code="too_many_bytes", retry_after_s=1)
        if held.total() > limits.all_bytes:
            message = f"This service holds more than {limits.all_bytes // MIB} MiB of bodies of requests in flight."
            raise APIError(503, f"{message} Try again in 1 s.", code="too_many_bytes", retry_after_s=1)

    def release(self) -> None:
        """Stop counting the body."""
        if self._held:
            self._uploads.held[self._key] -= self._held
            self._held = 0
