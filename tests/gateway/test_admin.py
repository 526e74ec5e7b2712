"""The routes of operators: keys and limits that hold at once, and reload without a dropped request."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import threading
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from service.errors import EngineError, HubUnreachableError, RegistryError, ServiceError
from service.gateway.clients import ClientRegistry
from service.gateway.key_set import KeySource
from service.gateway.live_config import LiveConfig
from service.gateway.local_pool import EngineHandle
from service.gateway.local_scheduler import LocalScheduler
from service.gateway.local_server import LocalServer, create_local_app
from service.gateway.metrics import Metrics
from service.ports import bound_ports
from service.registry.models import Adapter, ModelSpec, Registry
from service.settings import Settings
from service.usage.database import DatabaseError, open_database
from service.usage.key_records import DatabaseKeys, KeyRecord
from service.usage.keys import Keys
from service.usage.remote_keys import RemoteKeys
from tests.engine.running import free_port
from tests.gateway.upstream import (
    ALICE,
    ASK,
    BOB,
    KEYS,
    SPECS,
    Engine,
    RunningGateway,
    answers,
    eventually,
    serve_gateway,
    streams,
)

NEW = ModelSpec(key="new", path="assets/tiny", gpu="L4", task="generate")
LIMITS = '{"alice": {"admin": true}}'
POLL_S = 0.05


class Models:
    """The models file, as a test writes it."""

    def __init__(self) -> None:
        self.registry = Registry(SPECS)
        self.error: ServiceError | None = None
        self.refuses: ServiceError | None = None  # what an engine says to an adapter
        self.recorded: list[tuple[str, Adapter]] = []
        self.taken: list[Registry] = []

    async def prepare(self, _registry: Registry, _fetched: str | None) -> None:
        """Have engines load adapters."""
        if self.refuses:
            raise self.refuses

    def record(self, key: str, adapter: Adapter) -> None:
        """Keep an adapter."""
        self.recorded.append((key, adapter))

    def load(self) -> Registry:
        """Read it."""
        if self.error:
            raise self.error
        return self.registry


@pytest.fixture
def store(tmp_path: Path) -> DatabaseKeys:
    """Return an empty store, as another process of this machine has it open too."""
    file = tmp_path / "usage.sqlite3"
    return DatabaseKeys(lambda: open_database(file=file), file)


@asynccontextmanager
async def admin_gateway(
    store: DatabaseKeys | None,
    models: Models | None = None,
    url: str = "",
    keys: dict[str, str] = KEYS,
    limits: str = LIMITS,
) -> AsyncIterator[RunningGateway]:
    """Serve a gateway whose operator is alice."""
    source = KeySource({"API_LIMITS": limits if keys else ""}, keys, store, "tiny")
    clients = ClientRegistry.of(source.load_at_start(Registry(SPECS)))
    models = models or Models()

    def live(router: Any, clients: ClientRegistry) -> LiveConfig:
        return LiveConfig(
            source,
            clients,
            router,
            load_models=models.load,
            prepare_models=models.prepare,
            on_models=models.taken.append,
            record_adapter=models.record,
            poll_s=POLL_S,
        )

    async with serve_gateway(clients, url=url, live=live) as gateway:
        yield gateway
    if store:
        store.close()


async def ask(gateway: RunningGateway, path: str, body: object = None, headers: Any = ALICE) -> tuple[int, Any]:
    """Send a request to a route for operators, and return status and JSON."""
    method = "GET" if body is None else "POST"
    async with gateway.http.request(method, gateway.url + path, json=body, headers=headers) as answer:
        return answer.status, await answer.json()


async def status(gateway: RunningGateway, key: str) -> int:
    """Return the status that a request with a key has."""
    async with gateway.post(ASK, headers={"Authorization": f"Bearer {key}"}) as answer:
        return answer.status


async def until(gateway: RunningGateway, key: str, wanted: int) -> None:
    """Ask with a key until the answer has this status."""
    async with asyncio.timeout(5):
        while await status(gateway, key) != wanted:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.01)


def test_key_is_made_limited_rotated_and_revoked_while_it_serves(store: DatabaseKeys) -> None:
    """Each holds with the answer; the key is in that answer and nowhere else."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, admin_gateway(store, url=engine.url) as gateway:
            _, made = await ask(gateway, "/admin/keys", {"name": "carol", "requests_per_minute": 3})
            first = made["key"]
            assert [await status(gateway, first) for _ in range(4)] == [200, 200, 200, 429]
            code, limited = await ask(gateway, "/admin/keys/limit", {"name": "carol", "requests_per_minute": None})
            assert (code, limited["limits"], await status(gateway, first)) == (200, {}, 200)
            await ask(gateway, "/admin/keys/limit", {"name": "carol", "models": ["other"]})
            assert await status(gateway, first) == 403
            await ask(gateway, "/admin/keys/limit", {"name": "carol", "models": None})

            _, rotated = await ask(gateway, "/admin/keys/rotate", {"name": "carol", "grace_s": 3600})
            assert [await status(gateway, key) for key in (first, rotated["key"])] == [200, 200]
            _, again = await ask(gateway, "/admin/keys/rotate", {"name": "carol", "grace_s": 0})
            assert [await status(gateway, key) for key in (first, rotated["key"], again["key"])] == [401, 401, 200]

            listed = await ask(gateway, "/admin/keys")
            assert [(one["name"], one["state"]) for one in listed[1]["keys"]] == [
                ("alice", "environment"),
                ("bob", "environment"),
                ("carol", "valid"),
            ]
            code, revoked = await ask(gateway, "/admin/keys/revoke", {"name": "carol"})
            assert (code, revoked["state"], await status(gateway, again["key"])) == (200, "revoked", 401)
            seen = str([listed, limited, revoked, *gateway.lines])
            assert not [key for key in (first, rotated["key"], again["key"]) if key in seen]

    asyncio.run(run())


def test_key_that_another_process_revokes_is_refused_within_the_poll(store: DatabaseKeys) -> None:
    """So is a new one let in; the stream that runs with it goes on."""
    keys = Keys(store)
    _, key = keys.new("carol", {})

    async def run() -> None:
        behaviour = streams(b"data: {}\n\n", ends=False)
        async with Engine(behaviour).serving() as engine, admin_gateway(store, url=engine.url) as gateway:
            running = await gateway.post(ASK | {"stream": True}, headers={"api-key": key})
            assert running.status == 200
            engine.behaviour = answers
            keys.revoke("carol")
            began = asyncio.get_running_loop().time()
            await until(gateway, key, 401)
            assert asyncio.get_running_loop().time() - began < POLL_S + 1
            assert engine.running == 1
            running.close()
            _, new = keys.new("carol", {})
            await until(gateway, new, 200)

    asyncio.run(run())


def test_service_without_keys_needs_one_from_the_first_on_and_never_opens_again(store: DatabaseKeys) -> None:
    """Nobody makes it over HTTP: without keys everybody who can connect would be the operator."""
    keys = Keys(store)

    async def run() -> None:
        async with Engine(answers).serving() as engine, admin_gateway(store, url=engine.url, keys={}) as gateway:
            assert await status(gateway, "any") == 200
            for path in ("/admin/keys", "/admin/reload"):
                assert (await ask(gateway, path, {"name": "eve", "admin": True}))[0] == 403
            _, key = keys.new("carol", {})
            await eventually(lambda: gateway.app.config is not None and gateway.app.config.clients.needs_key)
            assert [await status(gateway, one) for one in (key, "any")] == [200, 401]
            keys.revoke("carol")
            await until(gateway, key, 401)
            assert await status(gateway, "any") == 401

    asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "body", "match"),
    [
        ("/admin/keys", {"name": "alice"}, "already"),
        ("/admin/keys", {"name": "x", "models": ["tinny"]}, "Did you mean 'tiny'"),
        ("/admin/keys", {"name": "x", "concurrency": "4"}, "concurrency"),
        ("/admin/keys", {"name": 1}, "'name'"),
        ("/admin/keys", [], "'name'"),
        ("/admin/keys/rotate", {"name": "nobody"}, "does not exist"),
        ("/admin/keys/rotate", {"name": "x", "grace_s": True}, "grace_s"),
        ("/admin/keys/rotate", {"name": "alice"}, "API_KEYS"),
        ("/admin/keys/revoke", {"name": "x", "more": 1}, "nothing else"),
        ("/admin/keys/limit", {"name": "nobody", "concurrency": 1}, "does not exist"),
    ],
)
def test_change_that_is_wrong_is_refused_with_the_reason(
    store: DatabaseKeys, path: str, body: object, match: str
) -> None:
    """400, and nothing is kept."""

    async def run() -> None:
        async with admin_gateway(store) as gateway:
            code, answer = await ask(gateway, path, body)
            assert (code, match in answer["error"]["message"]) == (400, True), answer
        assert store.load() == {}

    asyncio.run(run())


def test_gateway_whose_keys_are_in_its_environment_alone_says_so() -> None:
    """Where the engines check keys themselves."""

    async def run() -> None:
        async with admin_gateway(None) as gateway:
            code, answer = await ask(gateway, "/admin/keys", {"name": "x"})
            assert (code, answer["error"]["code"]) == (400, "no_key_store")

    asyncio.run(run())


def test_reload_takes_new_models_without_a_dropped_request(store: DatabaseKeys) -> None:
    """A stream of a model that is gone afterwards runs to its end, while clients ask all the time."""
    models = Models()

    async def run() -> None:
        behaviour = streams(*[b"data: {}\n\n"] * 20, pause_s=0.05)
        async with Engine(behaviour).serving() as engine, admin_gateway(store, models, engine.url) as gateway:
            running = await gateway.post(ASK | {"model": "other", "stream": True}, headers=ALICE)
            engine.behaviour = answers
            asked = asyncio.ensure_future(keep_asking(gateway))
            assert (await ask(gateway, "/v1/models/new"))[0] == 404
            models.registry = Registry({"tiny": SPECS["tiny"], "new": NEW})
            assert await ask(gateway, "/admin/reload", {}) == (200, {"models": 2, "keys": 2})
            assert (await ask(gateway, "/v1/models/new"))[0] == 200
            assert (await ask(gateway, "/v1/models/other"))[0] == 404
            assert (await running.read()).count(b"data") == 20
            asked.cancel()
            await asyncio.wait([asked])
            assert len(seen) > 2
            assert set(seen) == {200}

    seen: list[int] = []

    async def keep_asking(gateway: RunningGateway) -> None:
        while True:
            async with gateway.post(ASK, headers=BOB) as answer:
                await answer.read()
                seen.append(answer.status)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("error", "registry", "match"),
    [
        (RegistryError("Models file 'x': line 3 is wrong."), None, "line 3 is wrong"),
        (None, Registry({"other": SPECS["other"]}), "API_LIMITS of 'alice'"),
    ],
)
def test_reload_of_a_wrong_file_is_refused_and_changes_nothing(
    error: ServiceError | None, registry: Registry | None, match: str
) -> None:
    """400 with the reason; models and keys stay as they were."""
    models, limits = Models(), '{"alice": {"admin": true, "models": ["tiny"]}}'

    async def run() -> None:
        async with (
            Engine(answers).serving() as engine,
            admin_gateway(None, models, engine.url, limits=limits) as gateway,
        ):
            models.error, models.registry = error, registry or models.registry
            code, answer = await ask(gateway, "/admin/reload", {})
            assert (code, answer["error"]["code"]) == (400, "reload_refused")
            assert match in answer["error"]["message"]
            assert await status(gateway, "a-key") == 200
            assert (await ask(gateway, "/v1/models", headers=BOB))[1]["data"][1]["id"] == "tiny"

    asyncio.run(run())


class BrokenStore:
    """A database that is gone, until it is back."""

    def __init__(self, record: KeyRecord) -> None:
        self.record, self.is_gone = record, False
        self.loads = 0

    def changes(self) -> int:
        """Return the version of the record, or fail."""
        self.loads += 1
        if self.is_gone:
            raise DatabaseError("The database is gone.")
        return self.record.version

    def load(self) -> dict[str, KeyRecord]:
        """Return the record, or fail."""
        if self.is_gone:
            raise DatabaseError("The database is gone.")
        return {self.record.name: self.record}

    def save(self, record: KeyRecord) -> None:
        """Keep a record, or fail."""
        if self.is_gone:
            raise DatabaseError("The database is gone.")
        self.record = record

    def close(self) -> None:
        """Do nothing."""


def test_keys_stay_valid_while_their_database_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    """It is told once; a change is 503 meanwhile; what was changed before it came back holds afterwards."""
    store: Any = BrokenStore(KeyRecord("carol", revoked_at=0.0))
    _, key = Keys(store).new("carol", {})

    async def run() -> None:
        async with Engine(answers).serving() as engine, admin_gateway(store, url=engine.url) as gateway:
            assert await status(gateway, key) == 200
            store.is_gone, loads = True, store.loads
            await eventually(lambda: store.loads > loads + 3)
            assert await status(gateway, key) == 200
            assert (await ask(gateway, "/admin/keys", {"name": "x"}))[0] == 503
            store.is_gone, store.record = False, KeyRecord("carol", 2)
            await until(gateway, key, 401)

    with caplog.at_level(logging.WARNING, "service.gateway.live_config"):
        asyncio.run(run())
    assert [record.message[:40] for record in caplog.records] == [
        "Keys and limits stay as they are, since ",
        "Keys and limits are read again.",
    ]


def test_start_with_keys_of_the_environment_alone_while_the_database_is_gone() -> None:
    """Those of the environment are valid; without any, every request would be let in, so the start fails."""
    store: Any = BrokenStore(KeyRecord("carol"))
    store.is_gone = True
    assert KeySource({}, KEYS, store, "tiny").load_at_start(Registry(SPECS)).names == {"alice", "bob"}
    with pytest.raises(DatabaseError):
        KeySource({}, {}, store, "tiny").load_at_start(Registry(SPECS))


def test_key_is_503_until_the_keys_could_first_be_read() -> None:
    """Clients send the request again; 401 would tell them that the key was revoked."""
    store: Any = BrokenStore(KeyRecord("carol", revoked_at=0.0))
    _, key = Keys(store).new("carol", {})
    store.is_gone = True

    async def run() -> None:
        async with Engine(answers).serving() as engine, admin_gateway(store, url=engine.url) as gateway:
            assert await status(gateway, "a-key") == 200
            assert await status(gateway, key) == 503
            store.is_gone = False
            await until(gateway, key, 200)
            assert await status(gateway, "wrong") == 401

    asyncio.run(run())


def test_command_changes_keys_of_a_gateway_elsewhere(store: DatabaseKeys) -> None:
    """Through its routes for operators; what the gateway refuses is told in its words."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, admin_gateway(store, url=engine.url) as gateway:
            keys = RemoteKeys(f"{gateway.url}/v1/", "a-key")
            made = await asyncio.to_thread(keys.change, "new", "carol", {"concurrency": 1})
            assert await status(gateway, made["key"]) == 200
            await asyncio.to_thread(keys.change, "limit", "carol", {"models": ["other"]})
            assert await status(gateway, made["key"]) == 403
            rotated = await asyncio.to_thread(keys.change, "rotate", "carol", {"grace_s": 0})
            await asyncio.to_thread(keys.change, "revoke", "carol", {})
            assert [await status(gateway, one["key"]) for one in (made, rotated)] == [401, 401]
            listed = await asyncio.to_thread(keys.records)
            assert [(one["name"], one["state"]) for one in listed][-1] == ("carol", "revoked")
            with pytest.raises(ServiceError, match=r"answered 400: .*'carol' was revoked"):
                await asyncio.to_thread(keys.change, "limit", "carol", {"concurrency": 2})
            with pytest.raises(ServiceError, match="answered 403") as refused:
                await asyncio.to_thread(RemoteKeys(gateway.url, "b-key").records)
            assert refused.value.hint == "Set VLLM_API_KEY to an admin key of the gateway."

    asyncio.run(run())


ROOMY = ModelSpec(key="roomy", path="assets/tiny", gpu="L4", task="generate", max_cpu_loras=1)
POET = {"model": "roomy", "name": "poet", "hub_id": "org/poet", "revision": "a" * 40}


def test_adapter_of_the_hub_is_served_and_recorded(store: DatabaseKeys) -> None:
    """From the answer on, listed beside its model, within the models of each key; the same again changes nothing."""

    async def run() -> None:
        models = Models()
        models.registry = Registry({**SPECS, "roomy": ROOMY})
        async with Engine(answers).serving() as engine, admin_gateway(store, models, engine.url) as gateway:
            assert (await ask(gateway, "/admin/reload", {}))[0] == 200
            assert await ask(gateway, "/admin/adapters", POET) == (200, POET)
            assert await ask(gateway, "/admin/adapters", POET | {"model": "ROOMY"}) == (200, POET)
            adapter = Adapter(name="poet", hub_id="org/poet", revision="a" * 40)
            assert models.recorded == [("roomy", adapter)]
            assert models.taken[-1].specs["roomy"].adapters == (adapter,)
            listed = await ask(gateway, "/v1/models")
            assert {one["id"]: one["parent"] for one in listed[1]["data"]}["poet"] == "roomy"
            _, made = await ask(gateway, "/admin/keys", {"name": "carol", "models": ["tiny"]})
            carol = {"Authorization": f"Bearer {made['key']}"}
            assert "poet" not in str((await ask(gateway, "/v1/models", headers=carol))[1])
            async with gateway.post({**ASK, "model": "poet"}, headers=carol) as refused:
                assert (refused.status, (await refused.json())["error"]["code"]) == (403, "model_not_allowed")

    asyncio.run(run())


@pytest.mark.parametrize(
    ("change", "status", "sentence"),
    [
        ({"hub_id": "https://example.com/org/poet"}, 400, "field 'hub_id' is 'https://example.com/org/poet'"),
        ({"hub_id": "/srv/poet"}, 400, "field 'hub_id' is '/srv/poet'"),
        ({"hub_id": "../poet"}, 400, "field 'hub_id' is '../poet'"),
        ({"hub_id": "volume:poet"}, 400, "field 'hub_id' is 'volume:poet'"),
        ({"hub_id": "volume:org/poet"}, 400, "hub_id is 'volume:org/poet', an upload."),
        ({"revision": "main"}, 400, "its commit, 40 hexadecimal digits"),
        ({"name": "a/b"}, 400, "field 'name' is 'a/b'"),
        ({"path": "/srv/poet"}, 400, "and nothing else."),
        ({"name": None}, 400, "The body has the texts"),
        ({"model": "nobody"}, 404, "Unknown model 'nobody'."),
        ({"model": "tiny"}, 400, "Write max_cpu_loras = 8 into its entry"),
        ({"name": "tiny"}, 400, "'tiny' of model 'roomy' is already a name of model 'tiny'."),
        ({"name": "roomy"}, 400, "has a name that the entry uses already"),
    ],
)
def test_adapter_that_is_none_of_the_hub_or_has_no_place_is_refused(
    store: DatabaseKeys, change: dict[str, object], status: int, sentence: str
) -> None:
    """Never from a URL or a path, never without a commit, never in the place of another name."""

    async def run() -> None:
        models = Models()
        models.registry = Registry({**SPECS, "roomy": ROOMY})
        async with admin_gateway(store, models) as gateway:
            await ask(gateway, "/admin/reload", {})
            seen, answer = await ask(gateway, "/admin/adapters", POET | change)
            assert (seen, sentence in answer["error"]["message"]) == (status, True), answer
            assert models.recorded == []

    asyncio.run(run())


def test_adapter_that_an_engine_refuses_changes_nothing(store: DatabaseKeys) -> None:
    """The models from before are taken again, so that engines unload what they have loaded; a fault is a 503."""

    async def run() -> None:
        models = Models()
        models.registry = Registry({**SPECS, "roomy": ROOMY})
        async with admin_gateway(store, models) as gateway:
            await ask(gateway, "/admin/reload", {})
            for refused, status in ((EngineError("Its shapes differ."), 400), (HubUnreachableError("No route."), 503)):
                models.refuses = refused
                seen, answer = await ask(gateway, "/admin/adapters", POET)
                assert (seen, answer["error"]["code"]) == (status, "adapter_refused")
                assert answer["error"]["message"] == f"Nothing was changed: {refused}"
                assert models.taken[-1].specs["roomy"].adapters == ()
                assert models.recorded == []
            models.refuses = EngineError("Its shapes differ.")
            models.registry = Registry({**SPECS, "new": NEW})
            assert (await ask(gateway, "/admin/reload", {}))[0] == 400
            assert "new" not in str((await ask(gateway, "/v1/models"))[1])

    asyncio.run(run())


def test_hang_up_of_a_service_that_ignores_it_reloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As under nohup: a wrong file changes nothing, and the next signal takes the new one."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    models, source = Models(), KeySource({}, {}, None, "tiny")
    scheduler = LocalScheduler(_nothing, _never, free_memory=lambda: 0, needs_memory=lambda _: 0, idle_s=60)
    registry = Registry(SPECS)
    app = create_local_app(
        registry,
        SPECS["tiny"],
        scheduler,
        ClientRegistry.of(source.load(registry)),
        Metrics(),
        settings=Settings.load({}),
        source=source,
        load_models=models.load,
    )

    def listed(port: int) -> set[str]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5) as answer:
            return {model["id"] for model in json.load(answer)["data"]}

    def hang_up(port: int) -> None:
        try:
            seen.append("new" in listed(port))
            models.error = RegistryError("Line 3 is wrong.")
            os.kill(os.getpid(), signal.SIGHUP)
            deadline = time.monotonic() + 5
            while "Nothing was reloaded" not in str(told) and time.monotonic() < deadline:
                time.sleep(0.01)
            seen.append("new" in listed(port))
            models.error, models.registry = None, Registry({"tiny": SPECS["tiny"], "new": NEW})
            os.kill(os.getpid(), signal.SIGHUP)
            while "new" not in listed(port) and time.monotonic() < deadline:
                time.sleep(0.01)
            seen.append("new" in listed(port))
        finally:
            server.end()

    seen: list[bool] = []
    told: list[str] = []
    monkeypatch.setattr(logging.getLogger("service.gateway.live_config"), "error", lambda *words: told.append(words[0]))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with bound_ports("127.0.0.1", free_port()) as addresses:
            thread = threading.Thread(target=hang_up, args=(addresses[0].getsockname()[1],))
            server = LocalServer(app, addresses, scheduler, keep_alive_s=5, on_open=thread.start, on_drain=lambda: None)
            server.run((signal.SIGTERM,))
            thread.join()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert seen == [False, False, True]


def _nothing(_: ModelSpec) -> None:
    pass


def _never(*_: object) -> EngineHandle:
    raise AssertionError("no engine is started")
