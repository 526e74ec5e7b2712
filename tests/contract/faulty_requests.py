"""Requests of many clients to the deployed gateway, while Modal's proxy before the tier fails at random.

All but the control plane is as it is deployed: the gateway and the tier in containers, the real engine, pauses and
time-outs as in service. The pool is cold at the beginning of each round, since `run` waits until its replicas have
ended by their idle timeout. The engine's own log says which requests reached it.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests.contract.conftest import REPOSITORY, call, deploy, reaching
from tests.contract.gateways import KEY, deploy_gateway, put_secrets
from tests.fakes.hub import Hub, Repository, serving
from tests.fakes.modal import ContainerRuntime, ModalPlane, TaskState
from tests.fakes.modal.faults import Faults
from tests.gateway.faulty_platform import ask

TIER, MODEL = "vllm-l4", "counted"
IDLE_S = 2  # of a replica; the gateway takes a pool for ready for half as long after an answer
ENDS_S = 40.0
_REVISION = "a" * 40
_MODELS = f"""
[models.counted]
hub_id = "me/tiny"
revision = "{_REVISION}"
gpu = "L4"
max_model_len = 2048
weights_gb = 0.004
extra_args = ["--enable-log-requests"]
"""
_REACHED = re.compile(r"Received request chatcmpl-(request-\d+)\b")
_WAKES = re.compile(r'gateway_cold_starts_total\{model="counted",outcome="(\w+)"\} (\d+)\.')


@dataclass
class Outcomes:
    """What became of the requests.

    Attributes:
        codes: Of the clients: `answered`, `broken`, or the code of an error.
        seconds: How long each request took.
        reached: How often each request reached an engine, by its id.
        boots: How many containers were started in each cold period.
        most_queued_cold: Requests that waited at Modal at once, while the pool was cold.
        wakes: Of the gateway's wakes, how many ended `ready` and `failed`.
    """

    codes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    reached: Counter[str] = field(default_factory=Counter)
    boots: list[int] = field(default_factory=list)
    most_queued_cold: int = 0
    wakes: dict[str, int] = field(default_factory=dict)


@contextmanager
def faulty_service(directory: Path, runtime: ContainerRuntime, faults: Faults) -> Iterator[tuple[ModalPlane, str]]:
    """Deploy the tiny model and the gateway; yield the plane, whose proxy fails before the tier, and the URL."""
    models = directory / "models.toml"
    models.write_text(_MODELS)
    settings = {"SERVICE_MODEL": MODEL, "SERVICE_MODELS_FILE": str(models), "SERVICE_SCALEDOWN_WINDOW": str(IDLE_S)}
    files = {file.name: file.read_bytes() for file in (REPOSITORY / "service/assets/tiny").iterdir()}
    with (
        serving(Hub(repositories={"me/tiny": Repository(_REVISION, files)})) as hub,
        ModalPlane(directory / "plane", container=reaching(runtime, hub)) as plane,
    ):
        put_secrets(plane)
        deploy(plane, SERVICE_MAX_CONTAINERS="3", **settings)
        url = deploy_gateway(plane, **settings)
        plane.web_endpoints.faults[TIER] = faults
        yield plane, url
        assert plane.failures == []
        assert plane.unknown_calls == []


def run(plane: ModalPlane, url: str, *, requests: int, rounds: int, at_once: int, seed: int) -> Outcomes:
    """Send requests in rounds, each to a cold pool, and return what became of them."""
    done = Outcomes()
    numbers = iter(range(requests))
    draw = random.Random(seed)  # noqa: S311 - no secret
    for left in range(rounds, 0, -1):
        share = (requests - sum(done.codes.values())) // left
        asyncio.run(_round(url, [next(numbers) for _ in range(share)], at_once, draw, done))
        plane.wait_until(lambda: all(task.state is TaskState.DEAD for task in _replicas(plane)), ENDS_S, "the idle end")
    metrics = call(f"{url}/metrics", headers=KEY)[1].decode()
    done.wakes = {outcome: int(count) for outcome, count in _WAKES.findall(metrics)}
    replicas = _replicas(plane)
    done.reached = Counter(number for task in replicas for number in _REACHED.findall(task.log))
    done.boots = boots_of_cold_periods(replicas)
    (pool,) = [pool for pool in plane.pools if pool.app == TIER and pool.parameters.get("model") == MODEL]
    done.most_queued_cold = pool.most_queued_cold
    return done


async def _round(url: str, numbers: list[int], at_once: int, draw: random.Random, done: Outcomes) -> None:
    left = iter(numbers)
    async with aiohttp.ClientSession(headers=KEY) as http:

        async def client() -> None:
            for number in left:
                began = time.monotonic()
                code, wait_s = await ask(http, url, f"request-{number}", MODEL, streams=draw.random() < 0.5)
                done.codes[code] += 1
                done.seconds.append(time.monotonic() - began)
                await asyncio.sleep(draw.uniform(0, 0.02) + wait_s)

        await asyncio.gather(*(client() for _ in range(at_once)))


def _replicas(plane: ModalPlane) -> list[Any]:
    return [task for task in plane.tasks if task.app == TIER]


def boots_of_cold_periods(tasks: list[Any]) -> list[int]:
    """Return how many containers started in each period in which none took requests."""
    starts: dict[float, int] = {}
    for task in tasks:
        if any(other.ready_at and other.ready_at <= task.started_at < other.stopped_at for other in tasks):
            continue
        ready = [other.ready_at for other in tasks if other.ready_at and other.ready_at > task.started_at]
        until = min(ready, default=float("inf"))
        starts[until] = starts.get(until, 0) + 1
    return list(starts.values())
