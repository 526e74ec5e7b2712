"""Bodies as clients send them: their media type, content coding, byte order mark and size."""

from __future__ import annotations

import asyncio
import codecs
import gzip
import itertools
import json
import sys
import time
import zlib

import pytest

from service.gateway.metrics import RequestLog
from service.gateway.request_body import read_body
from service.gateway.uploads import Uploads
from tests.gateway.upstream import Engine, RunningGateway, answers, serve_gateway

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

BODY = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}).encode()
CODINGS = {"gzip": gzip.compress, "x-gzip": gzip.compress, "deflate": zlib.compress, "zstd": zstd.compress}
JSON = {"Content-Type": "application/json"}
MIB = 1024 * 1024


async def post(gateway: RunningGateway, body: object, headers: dict[str, str], path: str = "/v1/chat/completions"):  # type: ignore[no-untyped-def]
    """Send a body as it is, and return status, headers and the error."""
    skipped = () if "Content-Type" in headers else ("Content-Type",)
    async with gateway.http.post(gateway.url + path, data=body, headers=headers, skip_auto_headers=skipped) as answer:
        return answer.status, answer.headers, (await answer.json()).get("error")


def assert_none_woke(gateway: RunningGateway) -> None:
    """No pool was asked to wake."""
    assert all(pool.wakes == 0 for pool in gateway.pools.values())


@pytest.mark.parametrize(
    "media_type",
    [
        None,
        "text/plain",
        "text/plain;charset=UTF-8",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "text/plain; application/json",
        "application/jsonp",
        "application/json, text/plain",
    ],
)
def test_media_type_that_is_not_json_is_415_and_wakes_nothing(media_type: str | None) -> None:
    """A page may send these to another origin without a preflight, so they must start no engine."""

    async def run() -> None:
        async with serve_gateway() as gateway:
            headers = {"Content-Type": media_type} if media_type else {}
            status, answered, error = await post(gateway, BODY, headers)
            assert (status, error["code"]) == (415, "unsupported_media_type")
            assert answered["Accept"] == "application/json"
            assert "application/json" in error["message"]
            assert_none_woke(gateway)

    asyncio.run(run())


@pytest.mark.parametrize("media_type", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
def test_media_type_of_json_is_served(media_type: str) -> None:
    """With parameters, and in any case."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(url=engine.url) as gateway:
            assert (await post(gateway, BODY, {"Content-Type": media_type}))[0] == 200

    asyncio.run(run())


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("chunked", [False, True])
def test_body_in_a_known_coding_reaches_the_engine_decoded(coding: str, chunked: bool) -> None:
    """Codex compresses with zstd, OpenTelemetry with gzip; the engine knows neither."""
    packed = CODINGS[coding](BODY)

    async def pieces():  # type: ignore[no-untyped-def]
        for at in range(len(packed)):
            yield packed[at : at + 1]

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(url=engine.url) as gateway:
            headers = JSON | {"Content-Encoding": coding}
            assert (await post(gateway, pieces() if chunked else packed, headers))[0] == 200
            assert engine.requests[0].body == BODY
            assert "content-encoding" not in engine.requests[0].headers
            assert engine.requests[0].headers["content-length"] == str(len(BODY))
            assert json.loads(gateway.lines[0])["bytes_in"] == len(BODY)

    asyncio.run(run())


def test_body_in_no_coding_may_say_so() -> None:
    """`identity` is the name of none."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(url=engine.url) as gateway:
            assert (await post(gateway, BODY, JSON | {"Content-Encoding": "identity"}))[0] == 200
            assert engine.requests[0].body == BODY

    asyncio.run(run())


@pytest.mark.parametrize("coding", ["br", "gzip, zstd", "compress"])
def test_body_in_an_unknown_coding_is_415_with_those_that_are_known(coding: str) -> None:
    """`Accept-Encoding` names them, as RFC 9110 asks; one coding at a time."""

    async def run() -> None:
        async with serve_gateway() as gateway:
            status, headers, error = await post(gateway, BODY, JSON | {"Content-Encoding": coding})
            assert (status, error["code"]) == (415, "unsupported_content_encoding")
            assert headers["Accept-Encoding"] == "gzip, deflate, zstd"
            assert_none_woke(gateway)

    asyncio.run(run())


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda _: BODY, "is not"),
        (lambda packed: packed[:-5], "ends before"),
        (lambda packed: packed + packed, "goes on after"),
        (lambda packed: bytes([packed[0] ^ 0xFF]) + packed[1:], "is not"),
        (lambda _: b"", "ends before"),
    ],
    ids=["not packed", "cut", "twice", "flipped", "empty"],
)
def test_body_that_is_not_in_its_coding_is_400(coding: str, spoil, words: str) -> None:  # type: ignore[no-untyped-def]
    """The error names the coding and what is wrong."""

    async def run() -> None:
        async with serve_gateway() as gateway:
            headers = JSON | {"Content-Encoding": coding}
            status, _, error = await post(gateway, spoil(CODINGS[coding](BODY)), headers)
            assert (status, error["code"]) == (400, "invalid_content_encoding")
            assert coding.removeprefix("x-") in error["message"]
            assert words in error["message"]
            assert_none_woke(gateway)

    asyncio.run(run())


@pytest.mark.parametrize(("path", "limit"), [("/tokenize", MIB), ("/v1/chat/completions", 32 * MIB)])
@pytest.mark.parametrize("coding", CODINGS)
def test_body_whose_decoded_size_is_over_the_limit_is_413(coding: str, path: str, limit: int) -> None:
    """The limit counts decoded bytes: 32 KB of gzip are 32 MiB, 1 KB of zstd too."""
    packed = CODINGS[coding](BODY.ljust(limit + 1))
    assert len(packed) < limit / 500

    async def run() -> None:
        async with serve_gateway() as gateway:
            status, _, error = await post(gateway, packed, JSON | {"Content-Encoding": coding}, path)
            assert (status, error["code"]) == (413, "body_too_large")
            assert_none_woke(gateway)

    asyncio.run(run())


@pytest.mark.parametrize("coding", CODINGS)
def test_decoding_a_large_body_leaves_the_loop_free(coding: str) -> None:
    """While 31 MiB are decoded other requests go on: no turn of the loop takes as long as a fifth of the whole."""
    packed = CODINGS[coding](BODY.ljust(31 * MIB))
    turns: list[float] = []

    async def tick() -> None:
        while True:
            turns.append(time.thread_time())
            await asyncio.sleep(0)

    async def receive():  # type: ignore[no-untyped-def]
        return {"type": "http.request", "body": packed}

    async def run() -> None:
        ticking = asyncio.ensure_future(tick())
        scope = {"headers": [(b"content-encoding", coding.encode())]}
        with Uploads().track("alice") as upload:
            log = RequestLog("x", "POST", "/v1/completions")
            body = await read_body(32 * MIB, scope, receive, log, upload)
        assert len(body) == 31 * MIB
        ticking.cancel()

    asyncio.run(run())
    longest = max(after - before for before, after in itertools.pairwise(turns))
    assert longest < max(0.05, (turns[-1] - turns[0]) / 5)


def test_frame_of_zstd_that_demands_much_memory_is_400() -> None:
    """A frame may demand a window of 128 MiB before it decodes a byte; RFC 9659 allows 8 MiB."""
    options = {zstd.CompressionParameter.window_log: 27, zstd.CompressionParameter.content_size_flag: 0}
    compressor = zstd.ZstdCompressor(options=options)
    packed = compressor.compress(BODY) + compressor.flush()

    async def run() -> None:
        async with serve_gateway() as gateway:
            status, _, error = await post(gateway, packed, JSON | {"Content-Encoding": "zstd"})
            assert (status, error["code"]) == (400, "invalid_content_encoding")
            assert "memory" in error["message"]

    asyncio.run(run())


def test_byte_order_mark_before_the_body_is_skipped() -> None:
    """Windows PowerShell and .NET write one; RFC 8259 lets a parser ignore it, and vLLM does not."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(url=engine.url) as gateway:
            for headers, body in ((JSON, BODY), (JSON | {"Content-Encoding": "gzip"}, BODY.ljust(MIB))):
                marked = codecs.BOM_UTF8 + body
                packed = gzip.compress(marked) if "Content-Encoding" in headers else marked
                assert (await post(gateway, packed, headers))[0] == 200
                assert engine.requests[-1].body == body

    asyncio.run(run())


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_body_in_utf_16_or_32_is_400_that_says_so(encoding: str) -> None:
    """With a byte order mark and without; JSON on the network is UTF-8."""

    async def run() -> None:
        async with serve_gateway() as gateway:
            status, _, error = await post(gateway, BODY.decode().encode(encoding), JSON)
            assert (status, error["code"]) == (400, "invalid_json")
            assert error["message"] == "The body is in UTF-16 or UTF-32. Send one JSON object in UTF-8."
            assert_none_woke(gateway)

    asyncio.run(run())


def test_model_that_is_not_utf_8_is_400() -> None:
    """The parser skips strings without a look; the name of the model is read."""

    async def run() -> None:
        async with serve_gateway() as gateway:
            status, _, error = await post(gateway, BODY.replace(b"tiny", b"ti\xffny"), JSON)
            assert (status, error["param"]) == (400, "model")
            assert_none_woke(gateway)

    asyncio.run(run())
