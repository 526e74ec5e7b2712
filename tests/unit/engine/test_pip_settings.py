"""What pip is told reaches uv: the real pip and the real uv, against an index that only the user's settings name."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from service.engine.installer import Finished, run_uv
from service.engine.pip_settings import UvSettings, uv_settings
from tests.engine.running import REPOSITORY
from tests.unit.tls import self_signed

NAME = "only_on_the_mirror"  # no other index has it
WHEEL = f"{NAME}-1.0-py3-none-any.whl"
METADATA = {
    f"{NAME}.py": "",
    f"{NAME}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1.0\n",
    f"{NAME}-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    f"{NAME}-1.0.dist-info/RECORD": "",
}


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither pip nor uv is configured, and the package index of the world is out of reach."""
    for name in os.environ:
        if name.upper().startswith(("PIP_", "UV_", "SSL_")) or name.upper().endswith("_PROXY"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """Return a directory with the package."""
    directory = tmp_path / "wheels"
    directory.mkdir()
    with zipfile.ZipFile(directory / WHEEL, "w") as archive:
        for name, text in METADATA.items():
            archive.writestr(name, text)
    return directory


@pytest.fixture
def index(wheels: Path) -> Iterator[ThreadingHTTPServer]:
    """Serve an index on loopback that has this package alone."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Answer as an index by PEP 503."""
            pages = {
                f"/simple/{NAME.replace('_', '-')}/": f'<a href="/{WHEEL}">{WHEEL}</a>'.encode(),
                f"/{WHEEL}": (wheels / WHEEL).read_bytes(),
            }
            page = pages.get(self.path)
            self.send_response(404 if page is None else 200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(page or b"")))
            self.end_headers()
            self.wfile.write(page or b"")

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def install(tmp_path: Path) -> Callable[[], Finished]:
    """Return a function that installs the package with the real uv."""
    return lambda: run_uv("pip", "install", "--target", str(tmp_path / "target"), "--no-deps", NAME)


def url(index: ThreadingHTTPServer, scheme: str = "http") -> str:
    """Return the address of the index."""
    return f"{scheme}://127.0.0.1:{index.server_address[1]}/simple"


def test_package_without_the_mirror_is_not_found(
    install: Callable[[], Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the other tests show something."""
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")

    assert install().code != 0


@pytest.mark.parametrize("form", ["variable", "extra", "file", "user"])
def test_package_on_pips_mirror_is_installed_by_uv(
    install: Callable[[], Finished],
    index: ThreadingHTTPServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    form: str,
) -> None:
    """PIP_INDEX_URL, PIP_EXTRA_INDEX_URL beside an index that lacks it, PIP_CONFIG_FILE, and the user's pip.conf."""
    if form == "variable":
        monkeypatch.setenv("PIP_INDEX_URL", url(index))
    elif form == "extra":
        monkeypatch.setenv("PIP_INDEX_URL", url(index).replace("/simple", "/empty"))
        monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"{url(index).replace('/simple', '/other')} {url(index)}")
    else:
        file = tmp_path / ("pip.conf" if form == "file" else "config/pip/pip.conf")
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text(f"[global]\nindex-url = http://127.0.0.1:9/simple\n[install]\nindex-url = {url(index)}\n")
        monkeypatch.delenv("PIP_CONFIG_FILE")
        if form == "file":
            monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    finished = install()

    assert finished.code == 0, finished.lines


@pytest.mark.parametrize("told", ["", "cert", "trusted-host"])
def test_package_on_a_mirror_with_a_certificate_of_its_own_is_installed_where_pip_trusts_it(
    install: Callable[[], Finished],
    index: ThreadingHTTPServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    told: str,
) -> None:
    """PIP_CERT names the certificate, PIP_TRUSTED_HOST the host; without either the mirror is not trusted."""
    certificate = self_signed(tmp_path)
    index.socket = certificate.server_context().wrap_socket(index.socket, server_side=True)
    monkeypatch.setenv("PIP_INDEX_URL", url(index, "https"))
    if told == "cert":
        monkeypatch.setenv("PIP_CERT", str(certificate.file))
    elif told == "trusted-host":
        monkeypatch.setenv("PIP_TRUSTED_HOST", "127.0.0.1")
    finished = install()

    assert (finished.code == 0) is bool(told), finished.lines


def test_package_in_pips_directory_is_installed_without_any_index(
    install: Callable[[], Finished], wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PIP_NO_INDEX and PIP_FIND_LINKS, on a machine without a network."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (wheels.parent / "nowhere").mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", f"{wheels.parent / 'nowhere'} {wheels}")
    finished = install()

    assert finished.code == 0, finished.lines


@pytest.mark.parametrize(
    ("pip", "own"),
    [
        ("PIP_INDEX_URL", "UV_DEFAULT_INDEX"), ("PIP_INDEX_URL", "UV_INDEX_URL"), ("PIP_EXTRA_INDEX_URL", "UV_INDEX"),
        ("PIP_EXTRA_INDEX_URL", "UV_EXTRA_INDEX_URL"), ("PIP_TRUSTED_HOST", "UV_INSECURE_HOST"),
        ("PIP_FIND_LINKS", "UV_FIND_LINKS"), ("PIP_CERT", "SSL_CERT_FILE"), ("PIP_CERT", "UV_SYSTEM_CERTS"),
        ("PIP_PROXY", "HTTPS_PROXY"), ("PIP_PROXY", "ALL_PROXY"),
    ],
)  # fmt: skip
def test_settings_of_pip_come_after_a_variable_of_uvs_own(pip: str, own: str) -> None:
    """What the user told uv stays; the time-out is longer than uv's."""
    environ = {"PATH": os.environ["PATH"], "PIP_CONFIG_FILE": os.devnull, pip: "http://mirror/simple"}

    assert len(uv_settings(environ).env) > 1
    assert uv_settings(environ | {own: "mine"}) == UvSettings({"UV_HTTP_TIMEOUT": "300"})


def test_settings_of_pips_indexes_come_after_those_of_uvs_configuration(tmp_path: Path) -> None:
    """A variable would replace what stands in uv.toml."""
    file = tmp_path / "uv" / "uv.toml"
    file.parent.mkdir()
    environ = {"PIP_CONFIG_FILE": os.devnull, "XDG_CONFIG_HOME": str(tmp_path), "PIP_INDEX_URL": "http://mirror/simple"}
    file.write_text("native-tls = true\n")
    assert uv_settings(environ).env["UV_DEFAULT_INDEX"] == "http://mirror/simple"

    file.write_text('[[index]]\nurl = "https://mine/simple"\n')
    assert "UV_DEFAULT_INDEX" not in uv_settings(environ).env
    assert "UV_DEFAULT_INDEX" in uv_settings(environ | {"UV_NO_CONFIG": "1"}).env


@pytest.mark.parametrize("name", ["UV_HTTP_TIMEOUT", "UV_REQUEST_TIMEOUT", "HTTP_TIMEOUT"])
def test_settings_leave_a_timeout_of_the_user(name: str) -> None:
    """Whichever of uv's names it has."""
    assert uv_settings({"PIP_CONFIG_FILE": os.devnull, name: "5"}) == UvSettings({})


def test_settings_have_pips_main_index_before_the_others() -> None:
    """A local index may have a plain wheel where the main one has that of the platform with its libraries beside it."""
    environ = {"PATH": os.environ["PATH"], "PIP_CONFIG_FILE": os.devnull, "PIP_EXTRA_INDEX_URL": "http://a http://b"}
    main = {"PIP_INDEX_URL": "http://main"}
    assert uv_settings(environ | main).env["UV_INDEX"] == "http://main http://a http://b"

    own, *others = uv_settings(environ).env["UV_INDEX"].split()
    assert own.startswith("https://")
    assert others == ["http://a", "http://b"]


def test_settings_are_those_of_the_pip_on_the_path_where_the_environment_has_none() -> None:
    """As with uvx: what it makes has no pip."""
    script = "from service.engine.pip_settings import uv_settings; print(uv_settings().env.get('UV_FIND_LINKS'))"
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PIP_FIND_LINKS": "/some/wheels"}
    for path, found in ((Path(sys.executable).parent, "/some/wheels"), (Path("/nowhere"), None)):
        done = subprocess.run(
            [sys.executable, "-S", "-c", script],
            env={**env, "PATH": str(path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == f"{found}\n"
