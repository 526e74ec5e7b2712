"""Recordings through the gateway: which model a form goes to, what the engine gets of it, and what limits count."""

from __future__ import annotations

import asyncio
import io
import json

import aiohttp
import pytest

from service.gateway.clients import ClientRegistry
from service.registry.models import ModelSpec, Registry
from service.usage.limits import KeyLimits
from tests.gateway.forms import CONTENT_TYPE, RECORDING, form
from tests.gateway.upstream import ALICE, KEYS, SPECS, Engine, RunningGateway, answers, serve_gateway, streams

PATH = "/v1/audio/transcriptions"
REGISTRY = Registry(
    {
        "hears": ModelSpec(key="hears", path="x", aliases=("whisper-1",), task="transcription", fallback=("spare",)),
        "spare": ModelSpec(key="spare", path="x", task="transcription"),
        "chats": ModelSpec(key="chats", path="x", task="generate", modalities=("text", "audio")),
        **SPECS,
    }
)
EVENT = b'data: {"text":"a"}\n\n'


def post(gateway: RunningGateway, body: bytes, path: str = PATH, **headers: str):  # type: ignore[no-untyped-def]
    """POST a form."""
    headers = {"Content-Type": CONTENT_TYPE, **ALICE, **headers}
    return gateway.http.post(gateway.url + path, data=io.BytesIO(body), headers=headers)


@pytest.mark.parametrize(
    ("name", "sent"), [("hears", "hears"), ("whisper-1", "whisper-1"), ("HEARS:latest", "hears"), ("chats", "chats")]
)
@pytest.mark.parametrize("path", [PATH, "/v1/audio/translations"])
def test_form_goes_to_its_model_with_the_name_that_the_engine_knows(path: str, name: str, sent: str) -> None:
    """The recording arrives as it was, whatever the name becomes; a chat model that hears may have the route."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(url=engine.url, registry=REGISTRY) as gateway:
            async with post(gateway, form({"model": name, "language": "en"}), path) as answer:
                assert answer.status == 200
            (request,) = engine.requests
            assert request.line == f"POST {path}?model={'chats' if name == 'chats' else 'hears'} HTTP/1.1"
            assert request.headers["content-type"] == CONTENT_TYPE
            assert request.body == form({"model": sent, "language": "en"})

    asyncio.run(run())


def test_form_without_a_model_that_is_no_default_is_400() -> None:
    """The default model is one that chats."""

    async def run() -> None:
        async with serve_gateway(registry=REGISTRY) as gateway, post(gateway, form({})) as answer:
            error = (await answer.json())["error"]
            assert (answer.status, error["code"]) == (400, "unsupported_by_model")
            assert error["message"].endswith("transcription: hears, spare.")

    asyncio.run(run())


def test_form_that_streams_waits_for_a_wake_with_comments() -> None:
    """As every stream; the answer's events pass as they are."""

    async def run() -> None:
        async with (
            Engine(streams(EVENT)).serving() as engine,
            serve_gateway(registry=REGISTRY, comment_interval_s=0.01) as gateway,
            post(gateway, form({"model": "hears", "stream": "true"})) as answer,
        ):
            assert (await answer.content.readline()).startswith(b": waking hears")
            pool = gateway.pools["hears"]
            pool.url = engine.url
            pool.may_wake.set()
            assert (await answer.read()).endswith(EVENT)

    asyncio.run(run())


def test_form_key_is_checked_before_its_body_is_taken() -> None:
    """A recording of 25 MiB without a valid key costs nothing."""

    async def run() -> None:
        async with serve_gateway(ClientRegistry(KEYS), registry=REGISTRY) as gateway:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.url.rpartition(":")[2]))
            head = (
                f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: 26000000\r\n\r\n"
            )
            writer.write(head.encode())
            assert b" 401 " in await reader.readline()
            writer.close()

    asyncio.run(run())


def test_form_counts_by_its_texts_and_not_by_its_recording() -> None:
    """A limit of tokens has room for a recording whose bytes would be millions of them."""
    clients = ClientRegistry(KEYS, {"alice": KeyLimits(tokens_per_minute=2000)})

    async def run() -> None:
        async with (
            Engine(answers).serving() as engine,
            serve_gateway(clients, url=engine.url, registry=REGISTRY) as gateway,
        ):
            for _ in range(2):
                async with post(gateway, form({"model": "hears"}, RECORDING * 100_000)) as answer:
                    assert answer.status == 200
            lines = [json.loads(line) for line in gateway.lines]
            assert [(line["path"], line["key"], line["status"]) for line in lines] == [(PATH, "alice", 200)] * 2

    asyncio.run(run())


def test_form_has_no_fallback() -> None:
    """Each further model would get a copy of the recording."""

    async def run() -> None:
        async with serve_gateway(registry=REGISTRY, hold_s=0) as gateway:
            async with post(gateway, form({"model": "hears"}), **{"X-Fallback": "allow"}) as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (503, "model_waking")
            assert "spare" not in gateway.pools

    asyncio.run(run())


def test_form_of_aiohttp_is_read() -> None:
    """Another client's headers and boundary; curl's and OpenAI's are tried on an engine."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(url=engine.url, registry=REGISTRY) as gateway:
            data = aiohttp.FormData()
            data.add_field("file", RECORDING, filename="a b.wav", content_type="audio/wav")
            data.add_field("model", "HEARS")
            async with gateway.http.post(gateway.url + PATH, data=data) as answer:
                assert answer.status == 200
            assert b"\r\n\r\nhears\r\n--" in engine.requests[0].body
            assert RECORDING in engine.requests[0].body

    asyncio.run(run())
