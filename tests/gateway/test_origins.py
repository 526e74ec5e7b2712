"""Web pages: CORS, and the hosts and origins that a service without keys answers to."""

from __future__ import annotations

import asyncio
import hashlib
import json

import pytest

from service.gateway.clients import ClientRegistry
from service.gateway.origins import OriginPolicy
from service.in_engine.vllm_service.api_error import APIError
from service.settings import Settings
from tests.gateway.upstream import ALICE, ASK, Engine, RunningGateway, answers, serve_gateway, streams

KEYS = ClientRegistry({hashlib.sha256(b"a-key").hexdigest(): "alice"})
PAGE, OTHER_PAGE = "https://page.example", "https://other.example"
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}
ROUTES = ["/v1/chat/completions", "/v1/models", "/health", "/v1/responses/resp_1", "/nope"]
NAMES_HERE = [
    "localhost", "localhost:8000", "LOCALHOST:1", "localhost.", "127.0.0.1", "127.0.0.1:8000", "127.8.9.1",
    "[::1]:8000", "[::1]", "app.localhost:3000",
]  # fmt: skip
FOREIGN = [
    "evil.example", "evil.example:8000", "192.168.1.7", "0.0.0.0:8000", "2130706433", "localhost.evil.example",
    "xlocalhost", "", "evil.example@localhost", "localhost:80@evil.example", "[::2]", "::1", "localhost, evil.example",
    "[localhost",
]  # fmt: skip


def policy(cors_origins: str | None = None, allowed_hosts: str | None = None) -> OriginPolicy:
    """Return the policy of these settings."""
    return OriginPolicy.from_settings(Settings(cors_origins=cors_origins, allowed_hosts=allowed_hosts))


def assert_none_woke(gateway: RunningGateway) -> None:
    """No pool was asked to wake."""
    assert all(pool.wakes == 0 for pool in gateway.pools.values())


def cors(headers: object) -> dict[str, str]:
    """Return what an answer tells a browser about other origins."""
    return {name.lower(): value for name, value in headers.items() if name.lower().startswith("access-control-")}  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("origins", [PAGE, f"{OTHER_PAGE}, {PAGE.upper()}", "*"])
def test_preflight_of_an_allowed_origin_is_204_without_a_key(origins: str, path: str) -> None:
    """Browsers send no key with it. A path without a route too: the page may then read its 404."""

    async def run() -> None:
        async with (
            serve_gateway(KEYS, origins=policy(origins)) as gateway,
            gateway.http.options(gateway.url + path, headers=PREFLIGHT) as answer,
        ):
            assert (answer.status, await answer.read()) == (204, b"")
            assert cors(answer.headers) == {
                "access-control-allow-origin": "*" if origins == "*" else PAGE,
                "access-control-allow-methods": "DELETE, GET, HEAD, POST",
                "access-control-allow-headers": "authorization,content-type",
                "access-control-max-age": "600",
            }
            assert "Origin" in answer.headers["Vary"]
            assert_none_woke(gateway)

    asyncio.run(run())


@pytest.mark.parametrize("origins", [None, OTHER_PAGE, "https://page.example:8443", "http://page.example"])
@pytest.mark.parametrize("clients", [KEYS, None], ids=["keys", "no keys"])
def test_preflight_of_another_origin_is_204_that_allows_nothing(
    origins: str | None, clients: ClientRegistry | None
) -> None:
    """By the Fetch standard the browser then sends no request; 401 and 405 would say the same less clearly."""

    async def run() -> None:
        async with (
            serve_gateway(clients, origins=policy(origins)) as gateway,
            gateway.http.options(gateway.url + "/v1/chat/completions", headers=PREFLIGHT) as answer,
        ):
            assert (answer.status, cors(answer.headers)) == (204, {})
            assert "Origin" in answer.headers["Vary"]

    asyncio.run(run())


def test_options_that_is_no_preflight_is_answered_as_before() -> None:
    """Without the headers of a preflight it is a method like any other."""

    async def run() -> None:
        async with serve_gateway(KEYS, origins=policy("*")) as gateway:
            for headers, status in ({"Origin": PAGE}, 401), (ALICE, 405):
                async with gateway.http.options(gateway.url + "/v1/models", headers=headers) as answer:
                    assert answer.status == status

    asyncio.run(run())


@pytest.mark.parametrize(
    ("origins", "origin", "allowed"),
    [
        (PAGE, PAGE, PAGE),
        ("*", PAGE, "*"),
        ("*", "null", "*"),
        (PAGE, OTHER_PAGE, None),
        (PAGE, None, None),
        (None, PAGE, None),
    ],
)
def test_answers_have_the_headers_of_cors_errors_and_streams_too(
    origins: str | None, origin: str | None, allowed: str | None
) -> None:
    """A page reads errors, streams and the request id alike. Caches learn that answers differ by origin."""
    sent = {"Origin": origin} if origin else {}
    expected = {"access-control-allow-origin": allowed, "access-control-expose-headers": "*"} if allowed else {}

    async def run() -> None:
        behaviour = streams(b"data: [DONE]\n\n")
        async with (
            Engine(behaviour).serving() as engine,
            serve_gateway(KEYS, origins=policy(origins), url=engine.url) as gateway,
        ):
            for method, path, body, headers, status in (
                ("POST", "/v1/chat/completions", ASK | {"stream": True}, ALICE, 200),
                ("POST", "/v1/chat/completions", ASK | {"n": 0}, ALICE, 400),
                ("POST", "/v1/chat/completions", ASK, {}, 401),
                ("GET", "/v1/models", None, ALICE, 200),
                ("GET", "/health", None, {}, 200),
                ("DELETE", "/health", None, {}, 405),
                ("GET", "/nope", None, ALICE, 404),
            ):
                async with gateway.http.request(
                    method, gateway.url + path, json=body, headers={**headers, **sent}
                ) as answer:
                    assert (answer.status, cors(answer.headers)) == (status, expected), path
                    assert ("Origin" in answer.headers.getall("Vary", [])) == (origins == PAGE)

    asyncio.run(run())


def test_stream_that_waits_for_a_wake_has_the_headers_of_cors() -> None:
    """Its headers are the gateway's own."""

    async def run() -> None:
        async with (
            serve_gateway(KEYS, origins=policy(PAGE), comment_interval_s=0.01) as gateway,
            gateway.post(ASK | {"stream": True}, headers=ALICE | {"Origin": PAGE}) as answer,
        ):
            assert answer.headers["Access-Control-Allow-Origin"] == PAGE
            assert (await answer.content.readline()).startswith(b": waking")

    asyncio.run(run())


@pytest.mark.parametrize("host", NAMES_HERE)
def test_host_of_this_machine_is_served_without_keys(host: str) -> None:
    """Any name that no name server is asked for, any address of the loopback, any port: a tunnel may be in between."""
    policy().check_local({"headers": [(b"host", host.encode()), (b"origin", f"http://{host}".encode())]})


@pytest.mark.parametrize("host", FOREIGN)
@pytest.mark.parametrize("header", ["host", "origin"])
def test_host_that_is_foreign_is_403_without_keys(header: str, host: str) -> None:
    """The name of a site that was pointed at this machine (DNS rebinding), and what only looks like the loopback."""
    value = f"http://{host}" if header == "origin" else host
    with pytest.raises(APIError) as caught:
        policy().check_local({"headers": [(b"host", b"localhost:8000"), (header.encode(), value.encode())]})
    assert (caught.value.status, caught.value.code) == (403, f"{header}_not_allowed")
    assert f"'{value}'" in caught.value.message


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("headers", "setting"),
    [
        ({"Host": "evil.example:8000"}, "Set SERVICE_ALLOWED_HOSTS=evil.example to allow it"),
        ({"Origin": PAGE}, f"Set SERVICE_CORS_ORIGINS={PAGE} to allow it"),
        ({"Origin": "null"}, "Set SERVICE_CORS_ORIGINS=* to allow it"),
    ],
)
def test_request_of_a_foreign_page_is_403_on_every_route_and_wakes_nothing(
    headers: dict[str, str], setting: str, path: str
) -> None:
    """The error names the setting that allows it."""

    async def run() -> None:
        async with serve_gateway() as gateway:
            for method in ("GET", "POST"):
                async with gateway.http.request(method, gateway.url + path, json=ASK, headers=headers) as answer:
                    assert answer.status == 403
                    assert setting in (await answer.json())["error"]["message"]
            assert_none_woke(gateway)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("origins", "hosts", "headers"),
    [
        (None, "llm.example, 10.0.0.7", {"Host": "LLM.example:8000"}),
        (None, "llm.example", {"Host": "llm.example", "Origin": "https://llm.example"}),
        (None, "10.0.0.7,[fd00::7]", {"Host": "10.0.0.7:8000", "Origin": "http://[fd00::7]:3000"}),
        (PAGE, None, {"Origin": PAGE}),
        ("*", None, {"Origin": "null"}),
        ("app://obsidian.md", None, {"Origin": "app://obsidian.md"}),
    ],
)
def test_host_and_origin_of_the_settings_are_served_without_keys(
    origins: str | None, hosts: str | None, headers: dict[str, str]
) -> None:
    """SERVICE_ALLOWED_HOSTS for both, SERVICE_CORS_ORIGINS for pages."""

    async def run() -> None:
        async with (
            Engine(answers).serving() as engine,
            serve_gateway(origins=policy(origins, hosts), url=engine.url) as gateway,
            gateway.post(ASK, headers=headers) as answer,
        ):
            assert answer.status == 200

    asyncio.run(run())


def test_host_is_not_checked_with_keys() -> None:
    """A page has no key, and the service has as many names as its operator gives it."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(KEYS, url=engine.url) as gateway:
            async with gateway.post(ASK, headers=ALICE | {"Host": "llm.example", "Origin": PAGE}) as answer:
                assert answer.status == 200
            async with gateway.http.get(gateway.url + "/health", headers={"Host": "llm.example"}) as answer:
                assert answer.status == 200

    asyncio.run(run())


def test_refused_host_is_logged_with_its_code() -> None:
    """The operator finds the reason in the request log."""

    async def run() -> None:
        async with serve_gateway() as gateway, gateway.post(ASK, headers={"Host": "evil.example"}) as answer:
            assert answer.status == 403
        assert json.loads(gateway.lines[0])["code"] == "host_not_allowed"

    asyncio.run(run())
