"""Websockets through the door: both ways, ends from either side, refusals. The real container runtime, a sample app."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import aiohttp
import pytest

from .modal import ContainerRuntime, ModalPlane
from .sample import ASGI_APP, BOOT_S, command, deploy, deploy_asgi, get, running, traced

Client = aiohttp.ClientWebSocketResponse
LARGEST = b"x" * 2 * 2**20
Said = TypeVar("Said")


@pytest.fixture(scope="module")
def sockets(tmp_path_factory: pytest.TempPathFactory, runtime: ContainerRuntime) -> Iterator[ModalPlane]:
    """A plane with the ASGI application and the class deployed."""
    with running(tmp_path_factory.mktemp("sockets"), runtime) as plane:
        deploy_asgi(plane)
        deploy(plane)
        yield plane
        assert plane.unknown_calls == []


def talk(url: str, talking: Callable[[Client], Awaitable[Said]], protocols: tuple[str, ...] = ("a", "b")) -> Said:
    """Open a websocket and return what the conversation comes to."""

    async def conversation() -> Said:
        headers = {"Authorization": "Bearer k"}
        async with (
            asyncio.timeout(BOOT_S),
            aiohttp.ClientSession() as http,
            http.ws_connect(url, protocols=protocols, headers=headers, compress=15) as client,
        ):
            return await talking(client)

    return asyncio.run(conversation())


def test_websocket_carries_text_and_bytes_both_ways(sockets: ModalPlane) -> None:
    """The application sees the client's headers and the protocols it offers; messages keep their kind."""

    async def talking(client: Client) -> tuple[object, ...]:
        await client.send_str("grüße")
        text = await client.receive_str()
        await client.send_bytes(b"\0\xff")
        await client.send_bytes(LARGEST)
        said = client.protocol, client.compress, client._response.headers["X-Sample"]
        return *said, text, await client.receive_bytes(), await client.receive_bytes()

    answers = talk(f"{sockets.url_of(*ASGI_APP)}/websocket?q=1", talking)

    assert answers == ("b", 0, "1", "grüße", b"\0\xff", LARGEST)
    seen = traced(sockets, "websocket")[-1]
    assert (seen["scheme"], seen["query"]) == ("ws", {"q": "1"})
    assert "authorization" in seen["headers"]
    assert [name for name in seen["headers"] if name.startswith("sec-websocket") or name == "upgrade"] == []
    asked = ("GET", "/websocket?q=1", 101)
    sockets.wait_until(lambda: asked in sockets.door.requests, 5, "the connection's record")


def test_websocket_client_that_closes_is_noticed_with_its_code(sockets: ModalPlane) -> None:
    """`websocket.disconnect` reaches the application, and the input ends."""

    async def talking(client: Client) -> float:
        await client.send_str("x")
        await client.receive_str()
        closing_at = time.time()
        await client.close(code=4003)
        return closing_at

    closing_at = talk(f"{sockets.url_of(*ASGI_APP)}/websocket", talking)

    sockets.wait_until(lambda: [e for e in traced(sockets, "left") if e["at"] >= closing_at], 5, "the disconnect")
    assert traced(sockets, "left")[-1]["code"] == 4003
    sockets.wait_until(lambda: not any(task.inputs for task in sockets.tasks), 5, "the input's end")


def test_websocket_client_that_leaves_unread_messages_is_noticed(sockets: ModalPlane) -> None:
    """An application that waits for its reader goes on, and its input ends."""

    async def talking(client: Client) -> float:
        await client.send_str("flood")
        await client.receive_bytes()
        leaving_at = time.time()
        client.get_extra_info("socket").shutdown(2)
        return leaving_at

    leaving_at = talk(f"{sockets.url_of(*ASGI_APP)}/websocket", talking)

    sockets.wait_until(lambda: [e for e in traced(sockets, "left") if e["at"] >= leaving_at], 5, "the disconnect")
    sockets.wait_until(lambda: not any(task.inputs for task in sockets.tasks), 5, "the input's end")


def test_websocket_messages_have_a_limit(sockets: ModalPlane) -> None:
    """Modal takes 2 MiB a message, from either side."""

    async def talking(client: Client) -> object:
        await client.send_bytes(LARGEST + b"x")
        await client.receive()
        return client.close_code

    url = f"{sockets.url_of(*ASGI_APP)}/websocket"
    assert talk(url, talking) == 1009
    assert talk(url, lambda client: last_message(client, "grow"))[0] == 1009


def test_websocket_client_that_vanishes_is_noticed(sockets: ModalPlane) -> None:
    """A connection that breaks is no close of the client's."""

    async def talking(client: Client) -> float:
        await client.send_str("x")
        await client.receive_str()
        leaving_at = time.time()
        client.get_extra_info("socket").shutdown(2)
        return leaving_at

    leaving_at = talk(f"{sockets.url_of(*ASGI_APP)}/websocket", talking)

    sockets.wait_until(lambda: [e for e in traced(sockets, "left") if e["at"] >= leaving_at], 5, "the disconnect")
    assert traced(sockets, "left")[-1]["code"] == 1006


async def last_message(client: Client, said: str) -> tuple[object, object]:
    """Say something and return the code and the reason of the close that follows."""
    await client.send_str(said)
    message = await client.receive()
    return client.close_code, message.extra


def test_websocket_application_closes_with_code_and_reason(sockets: ModalPlane) -> None:
    """What the application says is what the client hears; one that says nothing leaves it without a close."""
    url = f"{sockets.url_of(*ASGI_APP)}/websocket"

    closing_at = time.time()
    assert talk(url, lambda client: last_message(client, "close")) == (4001, "told to close")
    sockets.wait_until(lambda: [e for e in traced(sockets, "left") if e["at"] >= closing_at], 5, "the disconnect")
    assert traced(sockets, "left")[-1]["code"] == 1000, "the answer of this client to a close"
    assert talk(url, lambda client: last_message(client, "return"))[0] == 1006


def test_websocket_that_the_application_refuses_is_a_403(sockets: ModalPlane) -> None:
    """A close before the accept, as ASGI has it."""
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        talk(f"{sockets.url_of(*ASGI_APP)}/websocket", lambda client: client.receive(), protocols=())
    assert refused.value.status == 403


def test_websocket_without_a_handshake_reaches_nobody(sockets: ModalPlane) -> None:
    """Neither key nor version: no input is made of it."""
    calls = len(list(sockets.calls("FunctionGetInputs")))
    status, said = get(f"{sockets.url_of('sample', 'Server', 'serve')}/websocket?model=none", {"Upgrade": "websocket"})
    assert (status, said) == (400, b"modal-http: not the handshake of a websocket\n")
    assert len(list(sockets.calls("FunctionGetInputs"))) == calls


def test_websocket_to_a_web_server_goes_through_modals_proxy(sockets: ModalPlane) -> None:
    """The query chooses the pool; Modal's proxy in the container loses the code of the server's close."""

    async def talking(client: Client) -> tuple[str, object]:
        await client.send_str("hello")
        text = await client.receive_str()
        await client.receive()
        return text, client.close_code

    url = f"{sockets.url_of('sample', 'Server', 'serve')}/websocket?model=ws"
    assert talk(url, talking, protocols=()) == ("hello", 1000)
    assert [task.parameters["model"] for task in sockets.tasks if task.app == "sample"] == ["ws"]


def test_websocket_that_a_web_server_does_not_take_is_an_error(sockets: ModalPlane) -> None:
    """Modal's proxy in the container fails on an answer that is no upgrade, and the client is told so."""
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        talk(f"{sockets.url_of('sample', 'Server', 'serve')}/health?model=ws", lambda client: client.receive())
    assert refused.value.status == 500


def test_websocket_to_a_container_that_dies_breaks(sockets: ModalPlane) -> None:
    """A killed container says no goodbye."""

    async def talking(client: Client) -> object:
        await client.send_str("x")
        await client.receive_str()
        next(task for task in sockets.tasks if task.app == ASGI_APP[0] and task.is_live).kill()
        await client.receive()
        return client.close_code

    assert talk(f"{sockets.url_of(*ASGI_APP)}/websocket", talking) == 1006


def test_websocket_without_a_proxy_token_starts_no_container(plane: ModalPlane) -> None:
    """Proxy auth comes first."""
    done = command(plane, "deploy", "-m", "sample.server", SAMPLE_AUTH="1")
    assert done.returncode == 0, done.stderr
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        talk(f"{plane.url_of('sample', 'Server', 'serve')}/websocket", lambda client: client.receive())
    assert refused.value.status == 401
    assert plane.tasks == []
