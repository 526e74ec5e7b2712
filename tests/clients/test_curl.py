"""Plain `curl -N` through gateway and real engine: events, as they come."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

from tests.engine.dialogues import COUNTING, dialogue
from tests.engine.running import Service

from .clients import KEY

COUNT = dialogue("count")


def test_curl_without_buffer_gets_events_as_they_are_made(served: Service, tmp_path: Path) -> None:
    """The first event arrives long before the last; each is one `data:` line, and the text adds up."""
    body = json.dumps({"model": "tiny", **COUNTING, "n": 1})
    headers = tmp_path / "headers"
    command = [
        "curl", "-N", "--silent", "--show-error", "--max-time", "120", "--dump-header", str(headers),
        f"{served.url}/v1/chat/completions", "-H", f"Authorization: Bearer {KEY}",
        "-H", "Content-Type: application/json", "-d", body,
    ]  # fmt: skip
    events: list[tuple[float, bytes]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as curl:
        assert curl.stdout is not None
        pending = b""
        while chunk := curl.stdout.read(65536):
            *lines, pending = (pending + chunk).split(b"\n")
            events += [(time.monotonic(), line) for line in lines if line]
    assert (curl.returncode, pending) == (0, b"")
    assert "content-type: text/event-stream" in headers.read_text().lower()
    assert all(line.startswith(b"data: ") for _, line in events)
    *deltas, done = [line.removeprefix(b"data: ") for _, line in events]
    assert done == b"[DONE]"
    said = "".join(choice["delta"].get("content") or "" for delta in deltas for choice in json.loads(delta)["choices"])
    assert said.strip().startswith(COUNT.content)
    moments = {at for at, _ in events}
    assert len([at for at in moments if at < events[-1][0] - 0.02]) > 10  # not gathered into a few large pieces


def test_curl_with_a_wrong_key_gets_401_with_instructions(served: Service) -> None:
    """The response is 401 in OpenAI's shape and has the header that names the scheme."""
    command = ["curl", "--silent", "--include", "--max-time", "30", f"{served.url}/v1/chat/completions", "-d", "{}",
               "-H", "Authorization: Bearer sk-wrong"]  # fmt: skip
    head, _, body = subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition("\n\n")
    assert " 401 " in head.splitlines()[0]
    assert "www-authenticate: bearer" in head.lower()
    assert json.loads(body)["error"]["code"] == "invalid_api_key"
