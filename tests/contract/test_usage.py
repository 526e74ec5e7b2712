"""What a deployed service costs: containers' own times, divided among two keys; a replica and a gateway that die."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from service.registry.gpus import GPUS
from service.usage.database import open_database
from service.usage.report import unclosed_writers
from service.usage.writer_files import INTERVAL_S
from tests.contract.commands import run
from tests.contract.conftest import CHAT, call, deploy, posted
from tests.engine.dialogues import COUNTING, QUESTION
from tests.fakes.modal import ContainerRuntime, ModalPlane, TaskState

from .gateways import APP, KEY, TAG, deploy_gateway, put_secrets

BOB = {"Authorization": "Bearer sk-bob"}
MODEL = "tiny-l4"
DOLLARS_PER_S = GPUS["L4"].dollars_per_hour / 3600
LONG = {"model": MODEL, **COUNTING, "n": 1, "max_tokens": 1900}
SLACK_S = 1.0  # of a busy machine: clients see the end of a stream later than the engine does
OVERHEAD_S = 2.5  # of a container: until its program runs, and after it has ended


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory, engine_runtime: ContainerRuntime) -> Iterator[ModalPlane]:
    """A plane with the gateway and one tier, whose replicas end soon after their last request."""
    with ModalPlane(tmp_path_factory.mktemp("plane"), container=engine_runtime) as plane:
        put_secrets(plane)
        deploy_gateway(plane, SERVICE_MODEL="tiny")
        deploy(plane, SERVICE_MODEL="tiny", SERVICE_GPU="L4", SERVICE_SNAPSHOT="off", SERVICE_SCALEDOWN_WINDOW="3")
        yield plane
        assert plane.failures == []
        assert plane.unknown_calls == []


def usage(plane: ModalPlane, state: Path) -> dict[str, Any]:
    """Return the rows of `vllm-service usage --modal`, by name, and its notes; it keeps what it has read in `state`."""
    done = run(plane, "usage", "--modal", "--json", XDG_STATE_HOME=str(state))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {row["name"]: row for row in found["rows"]} | {"notes": found["notes"]}


def own_row(url: str) -> dict[str, Any]:
    """Return what the gateway tells alice of her own usage."""
    status, body = call(f"{url}/v1/usage", headers=KEY)
    assert status == 200, body
    return next((row for row in json.loads(body)["data"] if row["name"] == "alice"), {"requests": 0})


def rows_on_volume(plane: ModalPlane, key: str) -> set[tuple[str, int]]:
    """Return writer and number of a key's rows that a gateway has committed."""
    volume = plane.volumes["vllm-cache"]
    files = [name for name in volume.files() if name.startswith("usage/requests/")]
    rows = [json.loads(line) for name in files for line in volume.read(name).splitlines()]
    return {(row["writer"], row["number"]) for row in rows if row["key"] == key and row["status"]}


class Run(threading.Thread):
    """A long stream.

    Attributes:
        sent: When it was sent.
        first: When its first event came.
        end: When it ended.
    """

    sent = first = end = 0.0

    def __init__(self, url: str, headers: dict[str, str], delay_s: float = 0.0) -> None:
        super().__init__()
        self._url, self._headers, self._delay_s = url, headers, delay_s

    def run(self) -> None:
        """Send it and read it."""
        time.sleep(self._delay_s)
        self.sent = time.time()
        with posted(self._url, LONG, self._headers) as answer:
            answer.readline()
            self.first = time.time()
            answer.read()
        self.end = time.time()


def replicas(plane: ModalPlane) -> list[Any]:
    """Return the containers of the tier, oldest first."""
    return [task for task in plane.tasks if task.app == "vllm-l4"]


def test_cost_of_replicas_is_divided_among_two_keys_and_the_operator(plane: ModalPlane, tmp_path: Path) -> None:
    """Callers pay for the time of their requests, the operator for wakes, waiting and what a dead replica did."""
    service = plane.url_of(APP, TAG)
    url = service + CHAT
    assert call(url, {"model": MODEL, **QUESTION}, KEY)[0] == 200
    plane.wait_until(lambda: own_row(service)["requests"] == 1, 10, "the first request's row")
    before = own_row(service)
    runs = [Run(url, KEY), Run(url, BOB, delay_s=0.3)]
    for one in runs:
        one.start()
    for one in runs:
        one.join()
    alice, bob = runs
    (first,) = replicas(plane)
    plane.wait_until(lambda: first.state is TaskState.DEAD, 60, "the idle replica to end")

    with posted(url, LONG, BOB) as answer:  # wakes another one, which dies under it
        answer.readline()
        second = replicas(plane)[-1]
        second.kill()
        assert b"engine_lost" in answer.read()

    plane.wait_until(lambda: len(rows_on_volume(plane, "bob")) == 2, 2 * INTERVAL_S, "the gateway's rows")
    found = usage(plane, tmp_path)
    seconds = {name: found[name]["cost"] / DOLLARS_PER_S for name in ("alice", "bob", "(wake)", "(idle)")}
    # a request came to the engine after it was sent, and before its first event
    late, early = min(alice.end, bob.end) - bob.first, min(alice.end, bob.end) - bob.sent
    assert late > 0.2
    alices = seconds["alice"] - before["cost"] / DOLLARS_PER_S
    assert alice.end - alice.first - early / 2 - SLACK_S < alices < alice.end - alice.sent - late / 2 + SLACK_S
    assert bob.end - bob.first - late / 2 - SLACK_S < seconds["bob"] < bob.end - bob.sent - early / 2 + SLACK_S
    assert alices + seconds["bob"] == pytest.approx(max(alice.end, bob.end) - alice.sent, abs=2 * SLACK_S)
    ran = first.finished_at - first.started_at
    killed = second.finished_at - second.started_at
    assert ran - OVERHEAD_S < sum(seconds.values()) < ran + killed, (seconds, ran, killed)
    assert (found["alice"]["tokens_out"] > 1900, found["bob"]["tokens_out"]) == (True, 1900)
    assert found["bob"]["errors"] == 1


def test_gateway_that_is_killed_loses_what_it_had_not_committed_and_counts_nothing_twice(
    plane: ModalPlane, tmp_path: Path
) -> None:
    """The next container has all that was committed, each request once; the command says which one was killed."""
    service = plane.url_of(APP, TAG)

    def ask(times: int) -> None:
        for _ in range(times):  # refused, which is a row and wakes no replica
            assert call(service + CHAT, {"model": "unknown", **QUESTION}, KEY)[0] == 404

    before = len(rows_on_volume(plane, "alice"))
    ask(1)
    plane.wait_until(lambda: rows_on_volume(plane, "alice"), 2 * INTERVAL_S, "rows on the volume")
    ask(3)
    gateway = [task for task in plane.tasks if task.app == APP][-1]
    gateway.kill()
    committed = len(rows_on_volume(plane, "alice"))
    assert before <= committed <= before + 4

    ask(2)
    assert [task for task in plane.tasks if task.app == APP][-1] is not gateway
    plane.wait_until(lambda: own_row(service)["requests"] == committed + 2, INTERVAL_S, "the rows of both gateways")
    assert usage(plane, tmp_path)["alice"]["requests"] in range(committed, committed + 3)
    (file,) = tmp_path.rglob("usage-*.sqlite3")
    with closing(open_database(file=file)) as database:
        now = time.time()
        (killed,) = unclosed_writers(database, now + 90, silent_s=90 + now - gateway.finished_at)
    assert killed[1] < gateway.finished_at
