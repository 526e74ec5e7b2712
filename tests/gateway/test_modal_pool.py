"""Pools on Modal, without Modal: what a replica's health check tells, and when the replicas are all busy."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Callable
from types import SimpleNamespace

import modal
import pytest

from service.boots.records import BootRecord
from service.gateway import boot_volume, deployed_tier, modal_pool
from service.gateway.call_rate import CallRate
from service.gateway.deployed_tier import DeployedTier
from service.gateway.http_client.answer import ConnectError
from service.gateway.http_client.connection import Connection
from service.gateway.http_client.connections import Connections, Origin
from service.gateway.modal_pool import ModalPool
from service.gateway.tiers import Tiers
from service.in_engine.vllm_service.api_error import APIError
from service.modal_app import spend_store
from service.registry.gpus import find_gpu
from service.registry.models import Registry
from service.settings import Settings
from tests.gateway.upstream import Engine, Request

SPEC = Registry.load().specs["qwen3-8b"]


def pool(**settings: object) -> ModalPool:
    """Return the pool of a model."""
    return Tiers(Settings.model_validate(settings), {"Modal-Key": "x"}).pool(SPEC, None)


async def healthy(_: Request, writer: asyncio.StreamWriter) -> None:
    """Answer as the guard of an engine with a context of 4,096 tokens does."""
    writer.write(b"HTTP/1.1 200 OK\r\nx-max-model-len: 4096\r\ncontent-length: 15\r\n\r\n" + b'{"status":"ok"}')
    await writer.drain()


def test_modal_pool_knows_the_context_of_its_engine_once_it_was_woken() -> None:
    """Before that it is the entry's."""

    async def run() -> None:
        async with Engine(healthy).serving() as engine:
            one = pool(app="team")  # so it has no app of its own that is looked up first
            one._tier._url = engine.url
            assert one.max_model_len == 40960
            await one.ready()
            assert one.max_model_len == 4096
            assert engine.requests[0].line == "GET /health?model=qwen3-8b HTTP/1.1"

    asyncio.run(run())


@pytest.mark.parametrize("number", [errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED])
def test_modal_pool_outlasts_connections_that_are_not_opened_in_time(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are faults of what is between, as answers of its proxy are; a refused one means that nothing listens."""
    tries, connect = list[int](), Connections._connect

    async def fails_first(connections: Connections, origin: Origin) -> Connection:
        tries.append(number)
        if len(tries) < 3:
            raise ConnectError(number, "No connection.")
        return await connect(connections, origin)

    monkeypatch.setattr(Connections, "_connect", fails_first)

    async def run() -> None:
        async with Engine(healthy).serving() as engine:
            one = pool(app="team")
            one._tier._url = engine.url
            if number == errno.ECONNREFUSED:
                with pytest.raises(APIError, match="Its URL does not answer: No connection"):
                    await one.ready()
            else:
                await one.ready()
                assert len(tries) == 3

    asyncio.run(run())


@pytest.mark.parametrize("has_own", [True, False])
def test_modal_pool_finds_an_app_of_the_model_alone_before_that_of_its_tier(
    has_own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`deploy --per-model` makes one; where there is none, and none is named for all, the tier serves the model."""
    asked: list[str] = []

    async def run() -> None:
        async with Engine(healthy).serving() as engine:

            async def url(app: DeployedTier, command: str) -> str:
                asked.append(app.app)
                if app.app == "vllm-qwen3-8b-h100" and not has_own:
                    raise app._not_deployed(command)
                return engine.url

            monkeypatch.setattr(DeployedTier, "url", url)
            one = pool()
            await one.ready()
            assert one._app.app == asked[-1]
            assert len(engine.requests) == 1

    asyncio.run(run())
    assert asked == ["vllm-qwen3-8b-h100", *([] if has_own else ["vllm-h100"])]


@pytest.mark.parametrize(
    ("settings", "gpu", "command"),
    [
        ({}, None, "qwen3-8b"),
        ({}, "H200", "qwen3-8b qwen3-8b-h200"),
        ({"model": "tiny"}, None, "tiny qwen3-8b"),
        ({"model": "tiny", "gpu": "L4", "n_gpu": 2}, "H200", "tiny qwen3-8b-h200 --gpu L4:2"),
    ],
)
def test_modal_pool_that_is_not_deployed_names_the_command_that_keeps_the_gateways_default_and_gpu(
    settings: dict[str, object], gpu: str | None, command: str
) -> None:
    """A deploy of that model alone would make it the default, and without --gpu move the others."""
    tiers = Tiers(Settings.model_validate(settings), {"Modal-Key": "x"})
    assert tiers.pool(SPEC, find_gpu(gpu) if gpu else None)._command == f"vllm-service deploy {command}"


def test_modal_pool_is_full_when_all_replicas_that_it_may_have_are_busy() -> None:
    """It may have one, unless the setting says more."""
    one, two = pool(max_inputs=2), pool(max_containers=2, max_inputs=2)
    with one.track_request(), two.track_request():
        assert not one.is_full
        with one.track_request(), two.track_request():
            assert one.is_full
            assert not two.is_full
    assert not one.is_full


class Autoscaler:
    """Modal's handle of a pool with one replica, which no stop ends: requests keep it."""

    def __init__(self) -> None:
        self.now = {"min_containers": 1, "buffer_containers": 0, "scaledown_window": 900}
        self.changes: list[dict[str, int]] = []
        self.autoscaler = SimpleNamespace(
            settings=SimpleNamespace(aio=self._settings), update=SimpleNamespace(aio=self._update)
        )

    async def _settings(self) -> SimpleNamespace:
        return SimpleNamespace(**self.now)

    async def _update(self, **settings: int) -> None:
        self.changes.append(settings)
        self.now = self.now | settings


@pytest.fixture
def stoppable(monkeypatch: pytest.MonkeyPatch) -> tuple[ModalPool, Autoscaler]:
    """Return a pool with its autoscaler; a stop waits 0.1 s for its replica."""
    one, scaler = pool(), Autoscaler()

    async def locate() -> str:
        return "http://127.0.0.1:9"

    async def runners() -> int:
        return 1

    for name, fake in {"_locate": locate, "_function": lambda: scaler, "_runners": runners}.items():
        monkeypatch.setattr(one, name, fake)
    monkeypatch.setattr(modal_pool, "_STOP_S", 0.1)
    monkeypatch.setattr(modal_pool, "_STOP_POLL_S", 0.01)
    return one, scaler


def test_modal_pool_that_is_stopped_twice_at_once_has_its_first_settings_back(
    stoppable: tuple[ModalPool, Autoscaler],
) -> None:
    """The second stop would take the lowered settings for those before it."""
    one, scaler = stoppable
    before = scaler.now

    async def run() -> None:
        first = asyncio.create_task(one.stop())
        await asyncio.sleep(0.05)
        await asyncio.gather(first, one.stop())

    asyncio.run(run())
    assert scaler.now == before
    assert len(scaler.changes) == 2


def test_modal_pool_that_the_daily_limit_lowers_during_a_stop_stays_low_until_the_limit_gives_its_settings_back(
    stoppable: tuple[ModalPool, Autoscaler],
) -> None:
    """The limit gets the settings from before the stop; a stop that outlasts the limit's end changes nothing."""
    one, scaler = stoppable
    before = scaler.now

    async def run() -> None:
        stop = asyncio.create_task(one.stop())
        await asyncio.sleep(0.05)
        taken = await one.scale_to_zero()
        await stop
        assert (taken, scaler.now["min_containers"], scaler.now["scaledown_window"]) == (before, 0, 2)
        stop = asyncio.create_task(one.stop())
        await asyncio.sleep(0.05)
        await one.restore(taken)
        await stop
        assert scaler.now == before

    asyncio.run(run())


def test_modal_pool_that_is_stopped_ends_its_replicas_and_gives_the_autoscaler_its_settings_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where requests keep a replica alive longer than a stop waits."""
    one, left, done = pool(), [2, 1, 0], list[object]()

    async def locate() -> str:
        return "http://127.0.0.1:9"

    async def scale_to_zero() -> dict[str, int]:
        done.append("scaled to zero")
        return {"min_containers": 1}

    async def restore(settings: dict[str, int]) -> None:
        done.append(settings)

    async def runners() -> int:
        return left.pop(0) if len(left) > 1 else left[0]

    fakes = {"_locate": locate, "scale_to_zero": scale_to_zero, "restore": restore, "_runners": runners}
    for name, fake in fakes.items():
        monkeypatch.setattr(one, name, fake)
    monkeypatch.setattr(modal_pool, "_STOP_POLL_S", 0.001)

    asyncio.run(one.stop())
    assert done == ["scaled to zero", {"min_containers": 1}]

    left[:] = [1]
    monkeypatch.setattr(modal_pool, "_STOP_S", 0.01)
    asyncio.run(one.stop())
    assert done[2:] == ["scaled to zero", {"min_containers": 1}]


class Apps:
    """The apps that are deployed at Modal, each with one pool of some replicas.

    Attributes:
        replicas: By the app's name.
    """

    def __init__(self, **replicas: int) -> None:
        self.replicas = {name.replace("_", "-"): number for name, number in replicas.items()}
        self.updates: list[str] = []

    def handle(self, app: str, _: str) -> Callable[..., SimpleNamespace]:
        """Return what `modal.Cls.from_name` does: that an app is not there shows at the first call."""

        def replicas() -> int:
            if app not in self.replicas:
                raise modal.exception.NotFoundError(f"App '{app}' not found.")
            return self.replicas[app]

        async def url() -> str:
            return f"https://{app}.modal.run" if replicas() >= 0 else ""

        async def stats() -> SimpleNamespace:
            return SimpleNamespace(num_total_runners=replicas())

        async def settings() -> SimpleNamespace:
            return SimpleNamespace(min_containers=replicas(), buffer_containers=0, scaledown_window=900)

        async def update(**_: int) -> None:
            self.updates.append(f"{app}: {replicas()}")

        serve = SimpleNamespace(
            get_web_url=SimpleNamespace(aio=url),
            get_current_stats=SimpleNamespace(aio=stats),
            autoscaler=SimpleNamespace(settings=SimpleNamespace(aio=settings), update=SimpleNamespace(aio=update)),
        )
        return lambda **_: SimpleNamespace(serve=serve)


def test_modal_pool_of_an_app_that_was_stopped_has_no_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although its URL was looked up before; nothing is to be scaled there, and no settings are to be given back."""
    apps, one = Apps(vllm_h100=2), pool()
    monkeypatch.setattr(modal.Cls, "from_name", apps.handle)

    async def run() -> None:
        assert (await one.count_replicas(), await one.probe()) == (2, "ready")
        del apps.replicas["vllm-h100"]
        one._probed_at -= 10
        assert (await one.count_replicas(), await one.probe()) == (0, "not_deployed")
        with pytest.raises(APIError, match="No app 'vllm-h100' is deployed"):
            await one.scale_to_zero()
        await one.restore({"min_containers": 1})
        assert apps.updates == []

    asyncio.run(run())


def test_modal_pool_whose_own_app_was_stopped_is_that_of_the_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: the replicas of both are never counted as none."""
    apps, one = Apps(vllm_qwen3_8b_h100=1, vllm_h100=3), pool()
    monkeypatch.setattr(modal.Cls, "from_name", apps.handle)

    async def run() -> None:
        assert await one.count_replicas() == 1
        del apps.replicas["vllm-qwen3-8b-h100"]
        assert await one.count_replicas() == 3
        await one.scale_to_zero()
        assert apps.updates == ["vllm-h100: 3"]

    asyncio.run(run())


class Deploys:
    """A volume without records, and what Modal tells of deploys."""

    def __init__(self) -> None:
        self.is_deployed, self.asked = False, list[str]()

    async def failure(self, *_: object) -> None:
        """Return that nothing is recorded."""

    async def boots(self, _: object) -> list[BootRecord]:
        """Return none."""
        return []

    async def is_deployed_since(self, at: float, app: str, _: object) -> bool:
        """Return what the test says."""
        assert abs(time.time() - at) < 60
        self.asked.append(app)
        return self.is_deployed


def test_modal_pool_that_failed_is_woken_at_once_after_a_deploy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its failure is told again, and Modal is asked for deploys every few seconds at most."""
    deploys = Deploys()

    async def fails(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 500 X\r\ncontent-length: 4\r\n\r\nNo.\n")
        await writer.drain()

    async def run() -> None:
        async with Engine(fails).serving() as engine:

            async def url(_: DeployedTier, command: str) -> str:
                del command
                return engine.url

            async def refused() -> int:
                with pytest.raises(APIError, match="did not start"):
                    await one.ready()
                return len(engine.requests)

            monkeypatch.setattr(DeployedTier, "url", url)
            one = pool(app="team")
            one._volume = deploys  # type: ignore[assignment]
            assert [await refused() for _ in range(4)] == [1, 1, 1, 1]
            assert deploys.asked == ["team"]
            deploys.is_deployed = True
            assert await refused() == 1
            one._deploys_read_at -= 10
            assert await refused() == 2

    asyncio.run(run())


def test_modal_pool_that_is_not_deployed_tells_when_it_is_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch waits for the deploy; clients of OpenAI, which would give up soon, do not repeat."""
    monkeypatch.setattr(modal.Cls, "from_name", Apps().handle)
    with pytest.raises(APIError) as caught:
        asyncio.run(pool().ready())
    assert caught.value.code == "tier_not_deployed"
    assert caught.value.headers == {"Retry-After": "10", "x-should-retry": "false"}


@pytest.mark.parametrize("error", [modal.exception.ConnectionError("gone"), TimeoutError()])
def test_modal_pool_is_not_woken_where_modal_does_not_tell_what_was_spent(error: Exception) -> None:
    """A limit of spending that cannot be read allows nothing; the client is told to come back."""

    async def admit(_: ModalPool) -> None:
        raise error

    async def run() -> APIError:
        async with Engine(healthy).serving() as engine:
            one = pool(app="team")
            one._tier._url = engine.url
            one._guard = SimpleNamespace(check_day=lambda: None, admit=admit)  # type: ignore[assignment]
            with pytest.raises(APIError) as caught:
                await one.ready()
            assert engine.requests == []
            return caught.value

    refused = asyncio.run(run())
    assert (refused.status, refused.code) == (503, "model_failed")
    assert "could not be read from Modal" in refused.message
    assert int(refused.headers["Retry-After"]) >= 1


@pytest.mark.parametrize("what", ["url", "count", "scale", "load", "save"])
def test_call_to_modal_that_hangs_ends(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one would keep every wake waiting, and the stop of a day from its pools."""
    hanging = SimpleNamespace(aio=lambda *_, **__: asyncio.sleep(60))
    handle = SimpleNamespace(
        get_web_url=hanging, get_current_stats=hanging, autoscaler=SimpleNamespace(settings=hanging, update=hanging)
    )
    monkeypatch.setattr(modal.Cls, "from_name", lambda *_: lambda **_: SimpleNamespace(serve=handle))
    monkeypatch.setattr(modal.Dict, "from_name", lambda *_, **__: SimpleNamespace(get=hanging, put=hanging))
    for module in (modal_pool, deployed_tier, spend_store):
        monkeypatch.setattr(module, "CALL_S", 0.05)
    one, store = pool(app="team"), spend_store.DictStore("vllm")
    if what != "url":
        one._tier._url = "http://127.0.0.1:9"

    async def run() -> None:
        calls = {
            "url": one.ready, "count": one.count_replicas, "scale": one.scale_to_zero, "load": store.load,
            "save": lambda: store.save({}),
        }  # fmt: skip
        with pytest.raises((TimeoutError, APIError)):
            async with asyncio.timeout(5) as limit:
                await calls[what]()
        assert not limit.expired()

    asyncio.run(run())


def test_boot_volume_tells_of_deploys_since_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of none where Modal does not answer."""

    async def deployed_at(app: str) -> float:
        if app == "gone":
            raise modal.exception.NotFoundError("gone")
        return 100.0

    monkeypatch.setattr(boot_volume, "_deployed_at", SimpleNamespace(aio=deployed_at))

    async def run() -> list[bool]:
        volume = boot_volume.BootVolume("cache")
        return [
            await volume.is_deployed_since(at, app, CallRate()) for at, app in ((99, "a"), (101, "a"), (99, "gone"))
        ]

    assert asyncio.run(run()) == [True, False, False]
