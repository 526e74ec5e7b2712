"""Who drives the batches of an app."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from service.modal_app import batch_lease
from service.weights.locks import Lease
from tests.unit.weights.test_locks import Shared

APP = "vllm-gateway"


class Way:
    """One container's way to the Dict, which may be cut."""

    def __init__(self, shared: Shared) -> None:
        self._shared, self.is_cut = shared, False

    def __getattr__(self, name: str) -> Any:
        if self.is_cut:
            raise ConnectionError("Modal does not answer")
        return getattr(self._shared, name)


class Gateway:
    """Drives whenever it may, as `GatewayBatches.run` does, and counts what it commits."""

    def __init__(self, way: Way) -> None:
        self._way, self.drives, self.commits = way, False, 0

    async def run(self) -> None:
        """Drive until it is cancelled."""
        while True:
            async with batch_lease.driving(APP, self._way, self._commit, None):  # type: ignore[arg-type]
                self.drives = True
                try:
                    await asyncio.Event().wait()
                finally:
                    self.drives = False

    def _commit(self) -> None:
        self.commits += 1


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition."""
    while not condition():  # noqa: ASYNC110 - it may hold at any moment
        await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    def lease(way: Way, _prefix: str | None, commit: Any) -> Lease:
        return Lease(lambda: way, before_release=commit, expiry_s=0.6, poll_s=0.02)  # type: ignore[arg-type, return-value]

    monkeypatch.setattr(batch_lease, "volume_lease", lease)
    monkeypatch.setattr(batch_lease, "_LOOK_S", 0.02)


def test_gateway_that_cannot_renew_its_lease_stops_driving_before_the_next_one_begins() -> None:
    """Else both would send the same lines; it drives again once the next one has ended."""

    async def check() -> None:
        shared = Shared()
        way = Way(shared)
        first, second = Gateway(way), Gateway(Way(shared))
        both = 0
        tasks = [asyncio.create_task(first.run())]
        async with asyncio.timeout(20):
            await until(lambda: first.drives)
            tasks.append(asyncio.create_task(second.run()))
            way.is_cut = True
            while not second.drives:
                both += first.drives and second.drives
                await asyncio.sleep(0.01)
            way.is_cut = False
            for _ in range(50):
                both += first.drives and second.drives
                await asyncio.sleep(0.01)
            assert (both, second.drives) == (0, True)
            tasks[1].cancel()
            await until(lambda: first.drives)
        for task in tasks:
            task.cancel()
        assert [type(error) for error in await asyncio.gather(*tasks, return_exceptions=True)] == [
            asyncio.CancelledError,
            asyncio.CancelledError,
        ]
        assert (first.commits, second.commits) == (1, 1), "a lease that was lost is committed to nothing"
        assert shared.entries == {}

    asyncio.run(check())


def test_gateway_that_is_told_to_end_while_it_drives_ends_and_releases_its_lease() -> None:
    """The loss of the lease is not the only reason for a cancel."""

    async def check() -> None:
        shared = Shared()
        gateway = Gateway(Way(shared))
        task = asyncio.create_task(gateway.run())
        async with asyncio.timeout(10):
            await until(lambda: gateway.drives)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert (gateway.commits, shared.entries) == (1, {})

    asyncio.run(check())
