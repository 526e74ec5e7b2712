"""Bodies on their way: how slowly they may arrive, and how much of them is held."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from service.gateway.uploads import Upload, UploadLimits, Uploads
from service.in_engine.vllm_service.api_error import APIError, Message
from service.in_engine.vllm_service.http_contract import MIB

LIMITS = UploadLimits(piece_s=0.3, sweep_s=0.02, bytes_per_s=1000, key_bytes=10 * MIB, all_bytes=15 * MIB)


def run(work: Callable[[Upload], Awaitable[None]]) -> None:
    """Do this with an upload."""

    async def main() -> None:
        with Uploads(LIMITS).track("alice") as upload:
            await work(upload)

    asyncio.run(main())


def pieces(size: int, pause_s: float) -> Callable[[], Awaitable[Message]]:
    """Return a `receive` that gives so many bytes after each pause."""

    async def receive() -> Message:
        await asyncio.sleep(pause_s)
        return {"type": "http.request", "body": b"a" * size, "more_body": True}

    return receive


async def until_refused(upload: Upload, receive: Callable[[], Awaitable[Message]]) -> tuple[int, APIError, float]:
    """Receive until it is refused; return the number of pieces, the error and the seconds."""
    began, count = asyncio.get_running_loop().time(), 0
    try:
        while True:
            await upload.receive(receive)
            count += 1
    except APIError as error:
        return count, error, asyncio.get_running_loop().time() - began


def test_body_without_a_first_byte_is_408() -> None:
    """A declared length alone holds a request for a bounded time."""

    async def work(upload: Upload) -> None:
        count, error, took_s = await until_refused(upload, pieces(1, 60))
        assert (count, error.status, error.code) == (0, 408, "body_too_slow")
        assert 0.25 < took_s < 2

    run(work)


def test_body_of_single_bytes_is_408() -> None:
    """Each byte comes in time, and all of them are too slow."""

    async def work(upload: Upload) -> None:
        count, error, took_s = await until_refused(upload, pieces(1, 0.05))
        assert (error.status, error.code) == (408, "body_too_slow")
        assert f"{count} bytes" in error.message
        assert took_s < 2

    run(work)


def test_body_at_the_least_rate_arrives() -> None:
    """It takes longer than any pause between two pieces may."""

    async def work(upload: Upload) -> None:
        for _ in range(10):
            await upload.receive(pieces(200, 0.05))

    run(work)


def test_request_that_is_cancelled_while_it_waits_is_no_slow_body() -> None:
    """At the end of the service the cancellation goes on."""

    async def main() -> None:
        uploads = Uploads(LIMITS)
        with uploads.track("alice") as upload:
            task = asyncio.ensure_future(upload.receive(pieces(1, 60)))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert not uploads.waiting

    asyncio.run(main())


def test_bytes_over_the_share_of_a_key_are_429_and_those_of_all_503() -> None:
    """What a request held is free again when it ends, or when its body was passed on."""

    async def main() -> None:
        uploads = Uploads(LIMITS)
        with uploads.track("alice") as first, uploads.track("alice") as second, uploads.track("bob") as other:
            first.hold(4 * MIB)
            first.hold(6 * MIB)  # of the same body
            with pytest.raises(APIError, match="key 'alice' has more than 10 MiB") as caught:
                second.hold(5 * MIB)
            assert (caught.value.status, caught.value.headers["Retry-After"]) == (429, "1")
            second.release()
            with pytest.raises(APIError, match="more than 15 MiB") as caught:
                other.hold(10 * MIB)
            assert (caught.value.status, caught.value.headers["Retry-After"]) == (503, "1")
            first.release()
            other.hold(10 * MIB)
        assert uploads.held.total() == 0

    asyncio.run(main())
