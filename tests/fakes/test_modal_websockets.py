"""Websocket handshakes at the plane's web endpoints: the status of a refused one, and what it must not start."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import aiohttp
import pytest

from .modal import ContainerRuntime, ModalPlane
from .sample import ASGI_APP, BOOT_S, command, deploy, deploy_asgi, get, running, traced


@pytest.fixture(scope="module")
def sockets(tmp_path_factory: pytest.TempPathFactory, runtime: ContainerRuntime) -> Iterator[ModalPlane]:
    """A plane with the ASGI application and the class deployed."""
    with running(tmp_path_factory.mktemp("sockets"), runtime) as plane:
        deploy_asgi(plane)
        deploy(plane)
        yield plane
        assert plane.unknown_calls == []


def refused(url: str) -> int:
    """Open a websocket that must be refused; return the status."""

    async def ask() -> int:
        headers = {"Authorization": "Bearer k"}
        async with asyncio.timeout(BOOT_S), aiohttp.ClientSession() as http:
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                await http.ws_connect(url, headers=headers)
        return caught.value.status

    return asyncio.run(ask())


def test_websocket_that_the_application_refuses_is_a_403(sockets: ModalPlane) -> None:
    """A close before the accept is answered 403, as in ASGI; the application sees the client's headers and query."""
    assert refused(f"{sockets.url_of(*ASGI_APP)}/websocket?q=1") == 403
    seen = traced(sockets, "websocket")[-1]
    assert (seen["scheme"], seen["query"]) == ("ws", {"q": "1"})
    assert "authorization" in seen["headers"]
    assert [name for name in seen["headers"] if name.startswith("sec-websocket") or name == "upgrade"] == []
    sockets.wait_until(
        lambda: ("GET", "/websocket?q=1", 403) in sockets.web_endpoints.requests, 5, "the request's record"
    )
    sockets.wait_until(lambda: not any(task.inputs for task in sockets.tasks), 5, "the input's end")


def test_websocket_that_the_application_accepts_is_answered_501(sockets: ModalPlane) -> None:
    """The plane does not carry websockets, so a test cannot mistake an accepted one for a working connection."""
    assert refused(f"{sockets.url_of(*ASGI_APP)}/websocket?accept=1") == 501
    sockets.wait_until(lambda: not any(task.inputs for task in sockets.tasks), 5, "the input's end")


def test_websocket_with_a_malformed_handshake_creates_no_input(sockets: ModalPlane) -> None:
    """A handshake without key and version is answered 400 and creates no input."""
    calls = len(list(sockets.calls("FunctionGetInputs")))
    status, body = get(f"{sockets.url_of('sample', 'Server', 'serve')}/websocket?model=none", {"Upgrade": "websocket"})
    assert (status, body) == (400, b"modal-http: not the handshake of a websocket\n")
    assert len(list(sockets.calls("FunctionGetInputs"))) == calls


def test_websocket_that_a_web_server_does_not_take_is_an_error(sockets: ModalPlane) -> None:
    """Modal's proxy in the container fails on a response that is not an upgrade; the client gets a 500."""
    assert refused(f"{sockets.url_of('sample', 'Server', 'serve')}/health?model=ws") == 500


def test_websocket_without_a_proxy_token_starts_no_container(plane: ModalPlane) -> None:
    """Proxy auth is checked before the handshake and before a container starts."""
    done = command(plane, "deploy", "-m", "sample.server", SAMPLE_AUTH="1")
    assert done.returncode == 0, done.stderr
    assert refused(f"{plane.url_of('sample', 'Server', 'serve')}/websocket") == 401
    assert plane.tasks == []
