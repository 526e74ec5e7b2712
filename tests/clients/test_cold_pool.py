"""Every client requests a model that is not running: all are held during one wake, and all ignore the comments."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import psutil

from tests.engine.running import Service, wait_until

from . import clients
from .clients import COLD, COUNT, KEY, LiteLLM, counted


def test_clients_on_a_cold_pool_are_held_and_served(served: Service, litellm: LiteLLM, tmp_path: Path) -> None:
    """One wake serves streams and whole answers; the raw bytes of one stream contain the comments."""
    seen = tmp_path / "events"
    asking = {
        "openai": clients.python("openai_client.py"),
        "javascript": clients.javascript(tmp_path, "openai_client.mjs"),
        "anthropic": clients.python("anthropic_client.py"),
        "langchain": clients.python("langchain_client.py"),
        "litellm": clients.python("openai_client.py"),
    }
    whole = clients.python("openai_client.py")
    body = json.dumps({"model": COLD, "stream": True, **COUNT.request})
    curl = ["curl", "-N", "--silent", "--show-error", "--max-time", "200", "--output", str(seen),
            f"{served.url}/v1/chat/completions", "-H", f"Authorization: Bearer {KEY}",
            "-H", "Content-Type: application/json", "-d", body]  # fmt: skip
    with subprocess.Popen(curl) as raw:
        booting = _suspended_engine(served)
        for name, client in asking.items():
            url, key = (litellm.url, litellm.MASTER_KEY) if name == "litellm" else (served.url, KEY)
            client.ask(url, key, COLD, ["stream"])
        whole.ask(served.url, KEY, COLD, ["chat"])
        wait_until(lambda: seen.exists() and b": waking" in seen.read_bytes(), 30)
        time.sleep(2)  # the streams of the others began at most so much later
        booting.resume()
        for name, client in asking.items():
            said = client.outcomes().value("stream")
            assert (said["text"], said["in_pieces"]) == (COUNT.content, True), name
        assert whole.outcomes().value("chat")["text"] == COUNT.content
    assert raw.returncode == 0
    first, *_, last = [line for line in seen.read_text().splitlines() if line]
    assert first.startswith(f": waking {COLD} on ")
    assert last == "data: [DONE]"
    assert counted(served, "gateway_cold_starts_total", model=COLD, outcome="ready") == 1
    assert counted(served, "gateway_held_seconds_count", model=COLD) == len(asking) + 2
    assert counted(served, "gateway_held_seconds_bucket", le="0.1", model=COLD) == 0


def _suspended_engine(served: Service) -> psutil.Process:
    """Stop the engine that the first request starts: it would be ready before a stream gets its first comment."""
    ready = served.leader().pid

    def starting() -> list[psutil.Process]:
        children = psutil.Process(served.pid).children()
        return [one for one in children if one.pid != ready and "vllm_service.main" in one.cmdline()]

    wait_until(lambda: bool(starting()), 30)
    (engine,) = starting()
    engine.suspend()
    return engine
