"""The gateway behind nginx."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import requests

from tests.engine.dialogues import dialogue
from tests.engine.running import Service

from .nginx import Nginx

CAPITAL = dialogue("capital")


def test_chat_through_nginx_is_answered(served: Service, tmp_path: Path) -> None:
    """An operator's proxy needs no setting of its own for a plain answer."""
    with Nginx(tmp_path, served.port) as nginx:
        answer = requests.post(
            f"{nginx.url}/v1/chat/completions", json={"model": "tiny", **CAPITAL.request}, timeout=30
        )

    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == CAPITAL.content


def test_stream_through_nginx_is_not_buffered_and_outlives_a_silence_over_the_read_timeout(
    served: Service, tmp_path: Path
) -> None:
    """Nginx's default is 60 s and buffers; here it is 17 s, and the engine says nothing for 20 s."""
    leader = served.leader().pid
    core = next(process for process in served.engine() if process.pid != leader)
    body = {"model": "tiny", "stream": True, **CAPITAL.request}
    with Nginx(tmp_path, served.port, proxy="proxy_read_timeout 17s;") as nginx:
        core.suspend()
        threading.Timer(20, core.resume).start()
        began = time.monotonic()
        with requests.post(f"{nginx.url}/v1/chat/completions", json=body, timeout=60, stream=True) as answer:
            lines = [(time.monotonic() - began, line) for line in answer.iter_lines() if line]

    at, first = lines[0]
    assert first.startswith((b": waiting for ", b"data: {"))
    comments = [line for _, line in lines if line.startswith(b":")]
    assert comments
    assert at < 17
    assert lines[-1][1] == b"data: [DONE]"
    assert lines[-1][0] >= 20
    assert nginx.errors.count("upstream timed out") == 0
