"""Whether a hub answers: through proxies of each kind, and what is said of those that refuse."""

from __future__ import annotations

import os
import socket
import socketserver
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from service.errors import HubUnreachableError
from service.weights import hub as hubs
from service.weights.files import RepositorySpec
from service.weights.reach import Unreachable, why_unreachable
from tests.fakes.hub import Hub
from tests.unit.hub_client import FILES
from tests.unit.tls import self_signed

pytestmark = pytest.mark.usefixtures("cache", "slept")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test alone sets proxies and certificates, and none is passed by."""
    for name in os.environ:
        if name.lower().endswith("_proxy") or name.startswith(("SSL_", "HF_HUB_OFFLINE")):
            monkeypatch.delenv(name)


class _Socks(socketserver.BaseRequestHandler):
    """A SOCKS5 proxy without authentication, for one connection."""

    def handle(self) -> None:
        """Take the greeting and the request, connect, and pass bytes on in both directions."""
        client: socket.socket = self.request
        _, methods = client.recv(2)
        client.recv(methods)
        client.sendall(b"\x05\x00")
        *_, kind = client.recv(4)
        host = client.recv(4 if kind == 1 else client.recv(1)[0])
        (port,) = struct.unpack("!H", client.recv(2))
        with socket.create_connection((socket.inet_ntoa(host) if kind == 1 else host.decode(), port)) as upstream:
            client.sendall(b"\x05\x00\x00\x01" + b"\x00" * 6)
            back = threading.Thread(target=_pump, args=(upstream, client))
            back.start()
            _pump(client, upstream)
            back.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    while data := source.recv(65536):
        sink.sendall(data)
    sink.shutdown(socket.SHUT_WR)


class _Refusing(BaseHTTPRequestHandler):
    """An HTTP proxy that wants a password."""

    def do_HEAD(self) -> None:
        """Refuse."""
        self.send_error(407)

    def do_CONNECT(self) -> None:
        """Refuse."""
        self.send_error(407)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def running(server: socketserver.TCPServer) -> Iterator[str]:
    """Run a server on loopback; give `host:port`."""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def closed_port() -> str:
    """Return `host:port` of no server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def reason(url: str) -> Unreachable:
    """Return why a hub is not in reach."""
    unreachable = why_unreachable(url)
    assert unreachable
    return unreachable


def test_hub_that_answers_is_in_reach(hub: Hub) -> None:
    """Any answer counts, an error too."""
    assert why_unreachable(hub.url) is None
    hub.fails_with = 503
    assert why_unreachable(hub.url) is None


def test_hub_where_no_server_listens_is_offline() -> None:
    """There is nothing to mend but the connection."""
    found = reason(f"http://{closed_port()}")

    assert found.is_offline
    assert "Connection refused" in found.reason


def test_hub_that_the_user_switched_off_is_offline_and_is_not_asked(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `HF_HUB_OFFLINE=1` the client would download nothing."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    assert reason(hub.url).is_offline
    assert "HF_HUB_OFFLINE" in reason(hub.url).reason
    assert hub.requests == []


@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
def test_hub_behind_a_socks_proxy_is_in_reach_and_lists_files(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """The check and the hub's own client both go through it."""
    with running(socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Socks)) as address:
        monkeypatch.setenv("ALL_PROXY", f"{scheme}://{address}")
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        assert why_unreachable(hub.url) is None
        assert set(hubs.DEFAULT.list_files(RepositorySpec("org/mine")).files) == set(FILES)


@pytest.mark.parametrize("variable", ["ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy"])
def test_proxy_of_an_unknown_kind_is_named_without_its_password(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """One with a scheme that the client does not speak."""
    monkeypatch.setenv(variable, "socks4://user:s3cret@127.0.0.1:1080")
    found = reason(hub.url)

    assert found.reason == f"{variable}=socks4://127.0.0.1:1080 is no proxy that can be used"
    assert "socks5" in found.hint
    assert not found.is_offline


@pytest.mark.parametrize("scheme", ["http", "socks5h"])
def test_proxy_that_does_not_answer_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """The hub is not blamed for it."""
    address = closed_port()
    monkeypatch.setenv("ALL_PROXY", f"{scheme}://user:s3cret@{address}")
    found = reason("https://hub.invalid")

    assert found.reason.startswith(f"the proxy ALL_PROXY={scheme}://{address} does not answer")
    assert "s3cret" not in found.reason + found.hint
    assert not found.is_offline


@pytest.mark.parametrize("url", ["https://hub.invalid", "http://hub.invalid"])
def test_proxy_that_wants_a_password_is_told_as_such(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """For a tunnel, and for a plain request."""
    with running(ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)) as address:
        monkeypatch.setenv("HTTPS_PROXY", address)
        monkeypatch.setenv("http_proxy", address)
        found = reason(url)

    assert "refuses (407 Proxy Authentication Required)" in found.reason
    assert "user:password@" in found.hint
    assert not found.is_offline


def test_proxy_that_no_proxy_passes_by_has_no_part_in_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is in the own network."""
    monkeypatch.setenv("ALL_PROXY", f"http://{closed_port()}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    assert why_unreachable(hub.url) is None


def test_certificate_that_is_not_trusted_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that inspects TLS shows certificates of its own, which SSL_CERT_FILE makes known."""
    certificate = self_signed(tmp_path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    server.socket = certificate.server_context().wrap_socket(server.socket, server_side=True)
    with running(server) as address:
        found = reason(f"https://{address}")
        assert "certificate is not trusted" in found.reason
        assert "SSL_CERT_FILE" in found.hint
        assert not found.is_offline

        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.file))
        assert why_unreachable(f"https://{address}") is None


def test_server_that_speaks_no_tls_is_told_as_such(hub: Hub) -> None:
    """`https` where `http` is served, or a proxy that answers in the clear."""
    found = reason(hub.url.replace("http://", "https://"))

    assert "TLS fails" in found.reason
    assert not found.is_offline


@pytest.mark.parametrize("url", ["hub", "ftp://hub", "http://", "http://hub:port"])
def test_address_that_is_none_is_told_as_such(url: str) -> None:
    """HF_ENDPOINT was mistyped."""
    found = reason(url)

    assert "HF_ENDPOINT" in found.hint
    assert not found.is_offline


def test_error_of_a_listing_has_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever command asks."""
    monkeypatch.setenv("ALL_PROXY", "socks4://127.0.0.1:1080")
    with pytest.raises(HubUnreachableError, match=r"which is not in reach: ALL_PROXY=socks4.*Correct ALL_PROXY"):
        hubs.DEFAULT.list_files(RepositorySpec("org/mine"))
