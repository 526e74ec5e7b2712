"""The plane's web endpoints: pools by query, proxy auth, streams both ways, disconnects, the 150 s rule."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import time
import urllib.request
from collections.abc import Iterator

from .modal import ModalPlane
from .modal.faults import Fault, Faults
from .sample import BOOT_S, command, connection, deploy, get, live, pool_of


def test_web_endpoint_with_proxy_auth_refuses_before_a_container(plane: ModalPlane) -> None:
    """A request without a token starts no container; both forms of a token are accepted, a revoked token is not."""
    deploy(plane, SAMPLE_AUTH="1")
    url = f"{plane.url_of('sample', 'Server', 'serve')}/health?model=a"
    token = plane.proxy_tokens.create()
    assert get(url)[0] == 401
    assert get(url, {"Modal-Key": token.key, "Modal-Secret": "ws-wrong"})[0] == 401
    assert plane.tasks == []
    assert get(url, token.headers)[0] == 200
    assert get(url, {"Authorization": f"Bearer {token.bearer}"})[0] == 200
    plane.proxy_tokens.revoke(token)
    assert get(url, token.headers)[0] == 401
    answers = [401, 401, 200, 200, 401]
    plane.wait_until(
        lambda: [status for *_, status in plane.web_endpoints.requests] == answers, 5, "every answer's record"
    )


def test_web_endpoint_with_a_wrong_parameter_answers_400(shared: ModalPlane) -> None:
    """A parameter of the wrong type is answered 400 and starts no container."""
    count = len(shared.tasks)
    status, body = get(f"{shared.url_of('sample', 'Server', 'serve')}/health?model=w&n_gpu=two")
    assert (status, len(shared.tasks)) == (400, count)
    assert b"two" in body


def test_web_endpoint_passes_headers_and_bodies(shared: ModalPlane) -> None:
    """A large body comes back whole, with status and headers of the server in the container."""
    url = f"{shared.url_of('sample', 'Server', 'serve')}/echo?model=http"
    body = os.urandom(3_000_000)
    request = urllib.request.Request(url, data=body)  # noqa: S310
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
        assert (answer.status, answer.headers["X-Sample"], answer.read()) == (201, "1", body)


def test_web_endpoint_streams_the_response(shared: ModalPlane) -> None:
    """The first piece of the response arrives long before the last."""
    url = shared.url_of("sample", "Server", "serve")
    get(f"{url}/health?model=http")
    with connection(url) as opened:
        began = time.monotonic()
        opened.request("GET", "/slow?model=http&n=2&s=2")
        answer = opened.getresponse()
        assert answer.read1() == b"0\n"
        assert time.monotonic() - began < 2
        assert answer.read() == b"1\n"


def test_web_endpoint_streams_the_request(shared: ModalPlane) -> None:
    """A chunked body is forwarded as it arrives."""

    def pieces() -> Iterator[bytes]:
        for number in range(3):
            yield f"piece {number};".encode()
            time.sleep(0.05)

    headers = {"Transfer-Encoding": "chunked"}
    with connection(shared.url_of("sample", "Server", "serve")) as opened:
        opened.request("POST", "/echo?model=http", body=pieces(), encode_chunked=True, headers=headers)
        assert opened.getresponse().read() == b"piece 0;piece 1;piece 2;"


def test_web_endpoint_passes_a_disconnect_on(shared: ModalPlane) -> None:
    """The server in the container notices a client that disconnects from a stream."""
    with connection(shared.url_of("sample", "Server", "serve")) as opened:
        opened.request("GET", "/slow?model=http&n=400&s=0.05")
        answer = opened.getresponse()
        assert answer.read1()
        answer.close()
    task = next(task for task in shared.tasks if task.parameters.get("model") == "http")
    shared.wait_until(lambda: "client left" in task.log, 5, "the disconnect inside the container")
    shared.wait_until(lambda: not task.inputs, 5, "the input's end")


def test_web_endpoint_cancels_a_queued_request_whose_client_left(shared: ModalPlane) -> None:
    """A request that no container has taken is cancelled when its client disconnects."""
    with connection(shared.url_of("sample", "Server", "serve")) as opened:
        opened.request("GET", "/health?model=slow-in-prepare")
        shared.wait_until(
            lambda: live(shared, "slow-in-prepare") and pool_of(shared, "slow-in-prepare").tasks[0].pid,
            BOOT_S,
            "a container",
        )
        pool = pool_of(shared, "slow-in-prepare")
        os.kill(pool.tasks[0].pid or 0, signal.SIGSTOP)  # in its hook: it never gets ready
        assert pool.queued == 1
    shared.wait_until(lambda: not pool.queued, 5, "the cancellation")
    pool.tasks[0].kill()
    left = ("GET", "/health?model=slow-in-prepare", 499)
    shared.wait_until(lambda: left in shared.web_endpoints.requests, 5, "the request's record")
    assert (len(pool.tasks), pool.tasks[0].inputs_served) == (1, 0)


def test_web_endpoint_without_a_first_byte_redirects(plane: ModalPlane) -> None:
    """After the limit the client is redirected to a URL that waits for the same response."""
    plane.web_endpoints.redirect_after_s = 0.4
    deploy(plane)
    url = plane.url_of("sample", "Server", "serve")
    with connection(url) as opened:
        opened.request("GET", "/silent?model=slow&s=4")
        answer = opened.getresponse()
        location = answer.getheader("Location") or ""
    assert answer.status == 303
    assert "__modal_function_call_id=fc-" in location
    status, body = get(location)
    while status == 303:
        status, body = get(location)
    assert (status, body) == (200, b'{"status":"ok"}')
    assert len(list(plane.calls("FunctionGetInputs"))) <= 2


def test_web_endpoint_of_a_stopped_app_answers_404(plane: ModalPlane) -> None:
    """After `modal app stop` the app's URL answers 404."""
    deploy(plane)
    url = plane.url_of("sample", "Server", "serve")
    assert command(plane, "app", "stop", "sample", "--yes").returncode == 0
    assert get(f"{url}/health")[0] == 404


def test_web_endpoint_with_faults_answers_as_modals_proxy_does_when_it_fails(shared: ModalPlane) -> None:
    """Each kind comes, the same again from the same seed; without faults the endpoint is as before."""
    url = f"{shared.url_of('sample', 'Server', 'serve')}/health?model=http"
    assert get(url)[0] == 200
    seen: list[list[str]] = []
    for _ in range(2):
        shared.web_endpoints.faults["sample"] = faults = Faults(seed=1, share=0.8)
        try:
            for _ in range(40):
                with connection(url) as opened:
                    opened.request("GET", "/health?model=http")
                    with contextlib.suppress(http.client.HTTPException, ConnectionError):
                        opened.getresponse().read()
        finally:
            del shared.web_endpoints.faults["sample"]
        seen.append([fault.name for fault in faults.drawn])
        assert {*faults.drawn} == {*Fault}
    assert seen[0] == seen[1]
    assert get(url)[0] == 200
