"""Run with the ENGINE's python and the environment of an engine: vLLM's media connector, as its API server has it.

A web server listens on all addresses of the loopback, and names mean what `NAMES` says. For the program 127.0.0.1 is a
public address and 127.0.0.2 a private one. Prints one line of JSON: what became of each fetch, and what the server saw.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib
import io
import json
import socket
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NAMES = {
    "public.example": [["127.0.0.1"]],
    "private.example": [["127.0.0.2"]],
    "mixed.example": [["127.0.0.1", "127.0.0.2"]],
    "rebound.example": [["127.0.0.1"], ["127.0.0.2"]],  # at the first look, and from then on
    "unlisted.example": [["127.0.0.1"]],
}
HOSTS = ["public.example", "private.example", "mixed.example", "rebound.example"]
_looked_up: list[str] = []


def main() -> None:
    """Answer on stdout; whatever vLLM prints goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        importlib.import_module("vllm.plugins").load_general_plugins()
        connector = importlib.import_module("vllm_service.media_connector")
        is_public = connector.is_public
        connector.is_public = lambda address: address == "127.0.0.1" or is_public(address)
        socket.getaddrinfo = _lookup  # type: ignore[assignment]
        answer = asyncio.run(_fetch_all())
    print(json.dumps(answer))  # noqa: T201 - this is a program


def _lookup(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
    _looked_up.append(host)
    turns = NAMES[host]
    addresses = turns[min(_looked_up.count(host), len(turns)) - 1]
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]


def _png() -> bytes:
    buffer = io.BytesIO()
    importlib.import_module("PIL.Image").new("RGB", (3, 2)).save(buffer, "PNG")
    return buffer.getvalue()


def _unreadable(png: bytes) -> dict[str, bytes]:
    """Return what no decoder reads, by a name for it."""
    beyond = importlib.import_module("vllm_service.http_contract").IMAGE_PIXELS // 4096 + 1
    large = png[:16] + (4096).to_bytes(4, "big") + beyond.to_bytes(4, "big") + png[24:29]
    large += zlib.crc32(large[12:29]).to_bytes(4, "big") + png[33:]
    return {
        "large;base64": large,
        "cut;base64": png[:40],
        "garbled;base64": png.replace(b"IDAT", b"IDXX"),
        "text": png,
    }


async def _fetch_all() -> dict[str, Any]:
    png, seen = _png(), []

    class Web(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(f"{self.connection.getsockname()[0]} {self.path}")
            moved, body = self.path.startswith("/to"), b"" if self.path.startswith("/to") else png
            self.send_response(302 if moved else 200)
            self.send_header("Location", f"http://{self.path[4:]}:{at}/moved.png")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Stay silent."""

    with ThreadingHTTPServer(("0.0.0.0", 0), Web) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        at = server.server_address[1]
        urls = [f"http://{name}:{at}/{name}.png" for name in NAMES]
        urls += [f"http://public.example:{at}/to/{name}" for name in ("public.example", "private.example")]
        urls += [f"http://127.0.0.1:{at}/literal.png", f"http://[::1]:{at}/literal.png"]
        urls += ["file:///etc/passwd", "data:image/png;base64," + base64.b64encode(png).decode()]
        urls += [f"data:{kind},{base64.b64encode(data).decode()}" for kind, data in _unreadable(png).items()]
        results = {}
        for what, hosts in (("listed", HOSTS), ("none listed", None)):
            for url in urls:
                name = url.replace(f":{at}", "")[:60]
                results[f"{what}: {name}"] = await _fetch(url, hosts)
        results["twice: http://rebound.example"] = await _fetch(f"http://rebound.example:{at}/again.png", HOSTS)
        server.shutdown()
    return {"results": results, "seen": seen}


async def _fetch(url: str, hosts: list[str] | None) -> dict[str, Any]:
    """Fetch an image as the API server does, and by the blocking way, which it does not use."""
    envs = importlib.import_module("vllm.envs")
    registry = importlib.import_module("vllm.multimodal.media").MEDIA_CONNECTOR_REGISTRY
    connector = registry.load(envs.VLLM_MEDIA_CONNECTOR, allowed_local_media_path="/", allowed_media_domains=hosts)
    began = time.monotonic()
    try:
        outcome = list((await connector.fetch_image_async(url)).size)
    except Exception as error:  # noqa: BLE001 - each is an outcome
        outcome = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - began
    try:
        blocking = list(connector.fetch_image(url).size)
    except Exception as error:  # noqa: BLE001 - each is an outcome
        blocking = f"{type(error).__name__}: {error}"
    return {"outcome": outcome, "blocking": blocking, "seconds": seconds}


if __name__ == "__main__":
    main()
