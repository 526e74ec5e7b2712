"""The list of models and the entry of one: names, states, contexts."""

from __future__ import annotations

import asyncio
import time
from urllib.parse import unquote

import pytest
from yarl import URL

from service.gateway import catalog
from service.gateway.clients import ClientRegistry
from service.gateway.pool import Pool, State
from tests.gateway.upstream import ALICE, ASK, KEYS, Engine, answers, serve_gateway


def test_models_are_listed_with_their_state_and_none_is_woken() -> None:
    """GPU, context, price and state of every model."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(url=engine.url) as gateway:
            async with gateway.post(ASK) as answer:
                assert answer.status == 200
            async with gateway.http.get(gateway.url + "/v1/models") as answer:
                entries = {entry["id"]: entry for entry in (await answer.json())["data"]}
            states = {key: entry["state"] for key, entry in entries.items()}
            assert states == {"llm": "ready", "tiny": "ready", "other": "cold"}
            assert entries["other"]["gpu"] == "H100"
            assert entries["other"]["dollars_per_hour"] == 3.95
            assert entries["other"]["reason"] is None
            assert gateway.pools["other"].wakes == 0

    asyncio.run(run())


def test_models_tell_the_context_of_the_engine_and_what_cannot_run() -> None:
    """A model that does not fit is marked with the reason, and a request for it is a lasting 400 that wakes nothing."""

    async def run() -> None:
        async with serve_gateway() as gateway:
            async with gateway.http.get(gateway.url + "/v1/models"):
                gateway.pools["tiny"].served_max_model_len = 8192
                gateway.pools["other"].unfit = "its weights are 236 GB"
            async with gateway.http.get(gateway.url + "/v1/models") as answer:
                entries = {entry["id"]: entry for entry in (await answer.json())["data"]}
            assert entries["llm"]["max_model_len"] == entries["tiny"]["max_model_len"] == 8192
            assert (entries["other"]["state"], entries["other"]["reason"]) == (
                "does_not_fit",
                "other: its weights are 236 GB",
            )
            async with gateway.post({"model": "other", "messages": [], "stream": True}) as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (400, "model_too_large")
            assert gateway.pools["other"].wakes == 0

    asyncio.run(run())


def test_lists_that_are_requested_at_once_are_made_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each asks the machine for its memory in a thread; 32 of them kept the event loop from answering anybody."""
    at_once, most = 0, 0
    describe = catalog.describe

    def described(pool: Pool, state: State) -> dict[str, object]:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.01)
        at_once -= 1
        return describe(pool, state)

    monkeypatch.setattr(catalog, "describe", described)

    async def run() -> None:
        async with serve_gateway() as gateway:

            async def ask(path: str) -> int:
                async with gateway.http.get(gateway.url + path) as answer:
                    return answer.status

            paths = ["/v1/models", "/v1/models/other"] * 8
            assert await asyncio.gather(*map(ask, paths)) == [200] * len(paths)

    asyncio.run(run())
    assert most == 1


@pytest.mark.parametrize(
    ("name", "root"),
    [
        ("llm", "tiny"),
        ("small", "tiny"),
        ("other", "Org/Other-1B"),
        ("Org/Other-1B", "Org/Other-1B"),
        ("Org%2FOther-1B", "Org/Other-1B"),
        ("openai/org/other-1b", "Org/Other-1B"),
    ],
)
def test_one_model_is_found_by_each_of_its_names(name: str, root: str) -> None:
    """A hub id has a slash, which some clients encode; nothing wakes."""

    async def run() -> None:
        async with serve_gateway() as gateway:
            async with gateway.http.get(URL(f"{gateway.url}/v1/models/{name}", encoded=True)) as answer:
                assert answer.status == 200
                entry = await answer.json()
            assert (entry["id"], entry["object"], entry["root"]) == (unquote(name), "model", root)
            assert all(pool.wakes == 0 for pool in gateway.pools.values())

    asyncio.run(run())


def test_one_model_is_the_entry_of_the_list() -> None:
    """The list is one page with Anthropic's fields, and each of its entries can be asked for."""

    async def run() -> None:
        async with serve_gateway() as gateway:
            async with gateway.http.get(gateway.url + "/v1/models") as answer:
                listed = await answer.json()
            ids = [entry["id"] for entry in listed["data"]]
            assert (listed["first_id"], listed["last_id"], listed["has_more"]) == (ids[0], ids[-1], False)
            for entry in listed["data"]:
                async with gateway.http.get(f"{gateway.url}/v1/models/{entry['id']}") as answer:
                    assert await answer.json() == entry

    asyncio.run(run())


@pytest.mark.parametrize("name", ["x" * 513, "a%0Ab", "..%2F..%2Finvocations", "a/b/c/d"])
def test_one_model_whose_name_none_can_have_is_no_route(name: str) -> None:
    """A name has the bound of the body's `model`: looking for a similar one takes time that grows with it."""

    async def run() -> None:
        async with (
            serve_gateway() as gateway,
            gateway.http.get(URL(f"{gateway.url}/v1/models/{name}", encoded=True)) as answer,
        ):
            assert (answer.status, (await answer.json())["error"]["code"]) == (404, "route_not_found")

    asyncio.run(run())


def test_one_model_that_is_unknown_is_404_and_one_that_the_key_may_not_use_is_403() -> None:
    """The same errors as for a request to it."""
    clients = ClientRegistry(KEYS, models={"alice": frozenset({"tiny"})})

    async def run() -> None:
        async with serve_gateway(clients) as gateway:
            for name, status, code in (("nope", 404, "model_not_found"), ("other", 403, "model_not_allowed")):
                async with gateway.http.get(f"{gateway.url}/v1/models/{name}", headers=ALICE) as answer:
                    assert (answer.status, (await answer.json())["error"]["code"]) == (status, code)

    asyncio.run(run())
