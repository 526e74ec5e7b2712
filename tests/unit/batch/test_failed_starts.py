"""A batch on a model that does not start, or whose engine dies: how many boots it buys, and how its lines end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service.batch import commit_log, failed_starts, worker
from service.batch.commit_log import CommitLog
from service.batch.failed_starts import FailedStarts
from service.batch.lines import Line, named_model
from service.batch.worker import Answer, Progress, drive
from service.gateway import pool as pool_module
from service.gateway.pool import Endpoint, WakeError
from service.in_engine.vllm_service.api_error import APIError
from tests.gateway.upstream import SPECS, TestPool
from tests.unit.virtual_time import run_in_virtual_time


class FailingPool(TestPool):
    """A pool whose boots take this long and fail."""

    def __init__(self, boot_s: float, *, is_transient: bool) -> None:
        super().__init__(SPECS["tiny"])
        self.boot_s, self.is_transient, self.sent = boot_s, is_transient, 0

    async def wake(self) -> Endpoint:
        """Fail."""
        self.wakes += 1
        await asyncio.sleep(self.boot_s)
        raise WakeError("Its containers end.", is_transient=self.is_transient)

    async def send(self, line: Line) -> Answer:
        """Answer a line as a gateway does."""
        self.sent += 1
        with pytest.raises(APIError) as caught:
            await self.ready()
        error = caught.value
        wait_s = float(error.headers["Retry-After"])
        return Answer(error.status, error.body(line.url, ""), retry_after_s=wait_s, code=error.code)


async def at_once(work: Callable[[], Any]) -> Any:
    """Do in no thread what would be done in one."""
    return work()


def use_virtual_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the worker, its log, failed starts and pools read the loop's clock, and use no threads."""
    monkeypatch.setattr(worker, "in_thread", at_once)
    monkeypatch.setattr(commit_log, "in_thread", at_once)
    for module, clock in ((failed_starts, "time"), (pool_module, "monotonic")):
        monkeypatch.setattr(module, "time", SimpleNamespace(**{clock: lambda: asyncio.get_running_loop().time()}))


@pytest.mark.parametrize(
    ("boot_s", "is_transient", "wakes"),
    [(0, False, 18), (60, False, 16), (180, False, 12), (1800, False, 3), (60, True, 42)],
)
def test_batch_on_a_model_that_never_starts_wakes_it_for_an_hour_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, boot_s: float, is_transient: bool, wakes: int
) -> None:
    """It woke it until its window ended: 293, 245, 184, 42 and 961 times in a day. Later lines are not sent."""
    use_virtual_time(monkeypatch)
    lines = [Line(number, f"id {number}", "/v1/completions", b"{}") for number in range(1, 31)]

    async def run() -> tuple[Progress, FailingPool]:
        pool = FailingPool(boot_s, is_transient=is_transient)
        log = CommitLog(tmp_path / "out", tmp_path / "err", interval_s=600)
        progress = await drive(lines, pool.send, log, deadline_s=86_400)
        log.close()
        return progress, pool

    progress, pool = run_in_virtual_time(run())
    assert (progress.end, progress.failed, pool.wakes, pool.sent) == ("done", 30, wakes, 4 * wakes)
    for record in map(json.loads, (tmp_path / "err").read_text().splitlines()):
        assert record["response"]["status_code"] == 503
        assert record["response"]["body"]["error"]["code"] == "model_failed"


def test_batch_whose_lines_all_kill_their_engine_ends_after_an_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those in flight die with one engine, and each engine is a boot, here of a minute: 1,400 in a day before."""
    use_virtual_time(monkeypatch)
    lines = [Line(number, f"id {number}", "/v1/completions", b"{}") for number in range(1, 3001)]
    boots = 0
    booting: asyncio.Future[None] | None = None

    async def send(_: Line) -> Answer:
        nonlocal boots, booting
        if booting is None or booting.done():
            boots, booting = boots + 1, asyncio.ensure_future(asyncio.sleep(60))
        await asyncio.shield(booting)
        return Answer(502, b'{"error":{"code":"engine_lost"}}', retry_after_s=1, code="engine_lost", model="tiny")

    async def run() -> Progress:
        log = CommitLog(tmp_path / "out", tmp_path / "err", interval_s=600)
        progress = await drive(lines, send, log, deadline_s=86_400)
        log.close()
        return progress

    progress = run_in_virtual_time(run())
    assert (progress.end, progress.failed, boots) == ("done", 3000, 60)


def answer(code: str | None = "model_failed", model: str = "tiny") -> Answer:
    """Return an answer with this code; None: that of an engine."""
    return Answer(503 if code else 200, b"{}", retry_after_s=5, code=code, model=model)


@pytest.mark.parametrize(
    ("between", "pause_s", "is_given_up"),
    [
        (answer(code="overloaded"), 3600, True),
        (answer(code="model_waking"), 7000, True),  # a boot that takes hours
        (answer(code=None, model="other"), 3600, True),
        (answer(code=None), 3600, False),
        (answer(code="overloaded"), 7000, False),  # nobody has tried for hours: what was wrong may be mended
    ],
)
def test_failed_starts_end_with_an_answer_and_with_hours_without_a_try(
    monkeypatch: pytest.MonkeyPatch, between: Answer, pause_s: float, is_given_up: bool
) -> None:
    """What another model answers, or says of itself, does not count."""
    now = 1000.0
    monkeypatch.setattr(failed_starts, "time", SimpleNamespace(time=lambda: now))
    starts = FailedStarts()
    assert not starts.take(answer())
    now += pause_s / 2
    assert not starts.take(between)
    now += pause_s / 2 + 300
    assert starts.take(answer()) is is_given_up
    assert not starts.take(answer(model="other"))


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b'{"x":[1],"model":"tiny"}', "tiny"),
        (b"{}", ""),
        (b'{"model":null}', ""),
        (b'{"model":7}', ""),
        (b'{"model":"\xff"}', ""),
    ],
)
def test_named_model_of_any_body_is_told(body: bytes, name: str) -> None:
    """A body that the gateway will refuse ends no batch here."""
    assert named_model(body) == name
