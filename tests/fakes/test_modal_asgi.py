"""`@modal.asgi_app` on the plane: deploy, snapshot, streams and bodies both ways, clients that leave, other apps."""

from __future__ import annotations

import hashlib
import http.client
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest

from .modal import ContainerRuntime, ModalPlane, TaskState
from .sample import ASGI_APP, connection, deploy, deploy_asgi, get, running, traced

MIB = 2**20


@pytest.fixture(scope="module")
def asgi(tmp_path_factory: pytest.TempPathFactory, runtime: ContainerRuntime) -> Iterator[ModalPlane]:
    """A plane with the application deployed, then the class, and one container of the application up."""
    with running(tmp_path_factory.mktemp("asgi"), runtime) as plane:
        url = deploy_asgi(plane)
        assert get(f"{url}/health")[0] == 200
        deploy(plane)
        yield plane
        assert plane.unknown_calls == []


@pytest.fixture
def url(asgi: ModalPlane) -> str:
    """URL of the application."""
    return asgi.url_of(*ASGI_APP)


def container(plane: ModalPlane) -> Any:
    """Return the application's container."""
    return next(task for task in plane.tasks if task.app == ASGI_APP[0] and task.is_live)


def test_asgi_app_is_deployed_as_a_plain_function(asgi: ModalPlane) -> None:
    """The definition has what the decorators set: no class, no GPU, many inputs, a snapshot, a secret, the image."""
    function = asgi.function(*ASGI_APP)
    assert not function.is_class
    assert not function.resources.gpu_config.gpu_type
    assert (function.max_concurrent_inputs, function.concurrency_limit) == (1000, 1)
    assert function.checkpointing_enabled
    assert len(function.secret_ids) == 1
    assert not function.webhook_config.requires_proxy_auth
    assert asgi.images.env(function.image_id)["SAMPLE_LAYER"] == "1"


def test_asgi_app_is_made_after_the_restore(asgi: ModalPlane, url: str) -> None:
    """Imports are in the snapshot; the function's body and then the lifespan run in the restored container."""
    status, body = get(f"{url}/health")
    assert (status, json.loads(body)) == (200, {"started": True, "method": "GET"})
    task = container(asgi)
    assert task.restored
    (made,) = traced(asgi, "web")
    assert (made["imported_by"], made["task"]) == (task.former_ids[0], task.id)
    assert made["token"] == "t0"
    assert len(traced(asgi, "lifespan.startup")) == 1


def test_asgi_app_cold_is_started_once_for_many_requests(plane: ModalPlane) -> None:
    """Deploying starts nothing; many requests at once start one container, which works on all of them at once.

    Each holds a stream to its container for its body; one that does not get it within 5 s is answered 408.
    """
    url = deploy_asgi(plane)
    assert plane.tasks == []
    with ThreadPoolExecutor(150) as threads:
        answers = list(threads.map(lambda _: get(f"{url}/silent?s=6")[0], range(150)))
    assert set(answers) == {200}
    assert len(plane.tasks) == 1


def test_asgi_app_idle_scales_to_zero(plane: ModalPlane) -> None:
    """After the window the container ends with the lifespan's shutdown; the next request starts another."""
    url = deploy_asgi(plane, SAMPLE_SCALEDOWN_WINDOW="2")
    get(f"{url}/health")
    plane.wait_until(lambda: plane.tasks[0].state is TaskState.DEAD, 15, "the scaledown")
    assert plane.tasks[0].exit_code == 0, plane.tasks[0].log
    assert len(traced(plane, "lifespan.shutdown")) == 1
    assert get(f"{url}/health")[0] == 200
    assert len(plane.tasks) == 2


def test_asgi_app_with_proxy_auth_refuses_before_a_container(plane: ModalPlane) -> None:
    """Proxy auth applies to functions as it does to methods."""
    url = deploy_asgi(plane, SAMPLE_AUTH="1")
    assert get(f"{url}/health")[0] == 401
    assert plane.tasks == []
    assert get(f"{url}/health", plane.proxy_tokens.create().headers)[0] == 200


def test_asgi_response_streams_in_order(url: str) -> None:
    """Each piece arrives when it was sent, in order."""
    with connection(url) as opened:
        began = time.monotonic()
        opened.request("GET", "/slow?n=2&s=2")
        answer = opened.getresponse()
        assert answer.read1() == b"0\n"
        assert time.monotonic() - began < 2
        assert answer.read() == b"1\n"
        assert time.monotonic() - began > 1.9


def test_asgi_request_streams_in_while_the_response_streams_out(url: str) -> None:
    """A piece of the body comes back before the next one is sent; neither direction waits for the end of the other."""
    with connection(url) as opened:
        opened.putrequest("POST", "/echo")
        opened.putheader("Transfer-Encoding", "chunked")
        opened.endheaders()
        _send_chunk(opened, b"first")
        answer = opened.getresponse()
        assert answer.status == 201
        assert answer.headers.get_all("X-Sample") == ["1", "2"]
        assert answer.read1() == b"first"
        _send_chunk(opened, b"\xf0\x9f")
        assert answer.read1() == b"\xf0\x9f"
        _send_chunk(opened, b"")
        assert answer.read() == b""


@pytest.mark.parametrize("size", [1, 3 * MIB, 32 * MIB])
def test_asgi_request_body_comes_in_pieces(url: str, size: int) -> None:
    """A body of any size arrives whole and in more than one message."""
    body = _pattern(size)
    status, answer = get(f"{url}/digest", data=body)
    measured = json.loads(answer)
    assert status == 200
    assert (measured["size"], measured["sha256"]) == (size, hashlib.sha256(body).hexdigest())
    assert measured["largest"] <= 2 * MIB


def test_asgi_response_of_many_megabytes_is_whole(url: str) -> None:
    """32 MiB in, 32 MiB out."""
    body = _pattern(32 * MIB)
    assert get(f"{url}/echo", data=body) == (201, body)


def test_asgi_large_body_on_a_cold_app_waits_for_the_container(plane: ModalPlane) -> None:
    """The plane reads the body before the container can read it."""
    body = _pattern(32 * MIB)
    measured = json.loads(get(f"{deploy_asgi(plane)}/digest", data=body)[1])
    assert measured["sha256"] == hashlib.sha256(body).hexdigest()


def test_asgi_response_waits_for_a_slow_reader(asgi: ModalPlane, url: str) -> None:
    """When the reader pauses, the application blocks once Modal's client has filled its buffers; no byte is lost."""
    pieces = 6 * 1024  # of 16 KiB
    with connection(url) as opened:
        opened.request("GET", f"/flood?n={pieces}")
        answer = opened.getresponse()
        stalled = _settled(lambda: _most_sent(asgi))
        assert stalled < pieces * 0.7
        assert not traced(asgi, "flooded")
        assert len(answer.read()) == pieces * 16 * 1024
    asgi.wait_until(lambda: traced(asgi, "flooded"), 5, "the end of the flood")


def test_asgi_client_that_leaves_a_stalled_response_is_noticed(asgi: ModalPlane, url: str) -> None:
    """An application that waits for its reader gets the disconnect."""
    with connection(url) as opened:
        opened.request("GET", "/flood?n=1000000")
        opened.getresponse()
        _settled(lambda: _most_sent(asgi))
        leaving_at = time.time()
    _check_noticed(asgi, leaving_at)


def test_asgi_client_that_leaves_a_stream_is_noticed_within_a_second(asgi: ModalPlane, url: str) -> None:
    """`http.disconnect` reaches the application, and the input ends."""
    with connection(url) as opened:
        opened.request("GET", "/slow?n=10000&s=0.05")
        assert opened.getresponse().read1()
        leaving_at = time.time()
    _check_noticed(asgi, leaving_at)


def test_asgi_client_that_leaves_before_the_answer_is_noticed_within_a_second(asgi: ModalPlane, url: str) -> None:
    """A held request whose body was read ends as well."""
    held = len(traced(asgi, "held"))
    with connection(url) as opened:
        opened.request("POST", "/held", body=b"x" * 3 * MIB)
        asgi.wait_until(lambda: len(traced(asgi, "held")) > held, 5, "the request inside the container")
        leaving_at = time.time()
    _check_noticed(asgi, leaving_at)
    asgi.wait_until(lambda: asgi.web_endpoints.requests[-1] == ("POST", "/held", 499), 5, "the request's record")


def test_asgi_app_without_a_first_byte_redirects_and_keeps_the_body(plane: ModalPlane) -> None:
    """The plane has read the body when it answers 303; the URL of the redirect returns the response to that body."""
    url = deploy_asgi(plane)
    get(f"{url}/health")
    plane.web_endpoints.redirect_after_s = 0.4
    body = _pattern(20 * MIB)
    with connection(url) as opened:
        opened.request("POST", "/silent?s=1", body=body)
        answer = opened.getresponse()
        location = answer.getheader("Location") or ""
    assert answer.status == 303
    status, answer = get(location)
    while status == 303:
        status, answer = get(location)
    assert json.loads(answer)["sha256"] == hashlib.sha256(body).hexdigest()
    assert traced(plane, "web") == traced(plane, "web")[:1], "one container, one call"


def test_asgi_app_that_raises_answers_500(url: str) -> None:
    """An exception before the first byte is a 500; after it the connection is aborted, and the response incomplete."""
    assert (get(f"{url}/fail")[0], b"told to fail" in get(f"{url}/fail")[1]) == (500, True)
    with connection(url) as opened:
        opened.request("GET", "/cut")
        answer = opened.getresponse()
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            answer.read()


def test_asgi_app_looks_a_pool_of_another_app_up(asgi: ModalPlane, url: str) -> None:
    """The container's own client reads URL and statistics of a pool without waking it."""
    theirs = asgi.url_of("sample", "Server", "serve")
    count = len(asgi.tasks)
    found = json.loads(get(f"{url}/pool?model=looked-up")[1])
    assert found == {"url": theirs, "backlog": 0, "runners": 0}
    assert len(asgi.tasks) == count

    assert get(f"{theirs}/health?model=looked-up")[0] == 200
    assert json.loads(get(f"{url}/pool?model=looked-up")[1])["runners"] == 1
    assert "not found" in json.loads(get(f"{url}/missing")[1])["error"]


def test_asgi_app_reaches_the_url_of_an_app_that_was_deployed_later(asgi: ModalPlane, url: str) -> None:
    """A container streams from another app's container, cold or warm, from inside its own network."""
    theirs = asgi.url_of("sample", "Server", "serve")
    escaped = f"{theirs}/slow%3Fmodel=reached%26n=2%26s=2"
    assert get(f"{url}/fetch?url={escaped}") == (200, b"0\n1\n")
    with connection(url) as opened:
        began = time.monotonic()
        opened.request("GET", f"/fetch?url={escaped}")
        answer = opened.getresponse()
        assert answer.read1() == b"0\n"
        assert time.monotonic() - began < 2
        assert answer.read() == b"1\n"


def test_asgi_app_that_leaves_another_app_is_noticed_there(asgi: ModalPlane, url: str) -> None:
    """A connection that a container resets is closed at the other end too."""
    assert get(f"{url}/reset?port={urlsplit(url).port}")[0] == 200
    _check_noticed(asgi, traced(asgi, "reset")[-1]["at"])


def test_asgi_app_sees_a_container_that_dies_break_its_stream(asgi: ModalPlane, url: str) -> None:
    """A stream from a container that is killed ends with an error in the container that reads it."""
    theirs = asgi.url_of("sample", "Server", "serve")
    get(f"{theirs}/health?model=killed")
    pool = next(task for task in asgi.tasks if task.parameters.get("model") == "killed")
    with connection(url) as opened:
        opened.request("GET", f"/fetch?url={theirs}/slow%3Fmodel=killed%26n=400%26s=0.05")
        answer = opened.getresponse()
        assert answer.read1().startswith(b"0\n")
        pool.kill()
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            answer.read()


def _pattern(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


def _send_chunk(opened: http.client.HTTPConnection, data: bytes) -> None:
    opened.send(b"%x\r\n%s\r\n" % (len(data), data))


def _most_sent(plane: ModalPlane) -> int:
    return max((event["sent"] for event in traced(plane, "flood")), default=0)


def _settled(figure: Any) -> int:
    """Return a figure once it has not changed for half a second."""
    last, since = -1, time.monotonic()
    while time.monotonic() - since < 0.5:
        if (now := figure()) != last:
            last, since = now, time.monotonic()
        time.sleep(0.05)
    return last


def _check_noticed(plane: ModalPlane, leaving_at: float) -> None:
    """Check that the application hears of a client that leaves, and that the input ends."""

    def heard() -> list[float]:
        return [event["at"] for event in traced(plane, "left") if event["at"] >= leaving_at]

    plane.wait_until(heard, 5, "the disconnect inside the container")
    assert heard()[0] - leaving_at < 5
    plane.wait_until(lambda: not container(plane).inputs, 5, "the input's end")
