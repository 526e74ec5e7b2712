"""Every client requests a model that is not running: all are held during one wake, and all ignore the comments."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.engine.running import Service

from . import clients
from .clients import CAPITAL, COLD, KEY, LiteLLM, counted


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
    body = json.dumps({"model": COLD, "stream": True, **CAPITAL.request})
    curl = ["curl", "-N", "--silent", "--show-error", "--max-time", "200", "--output", str(seen),
            f"{served.url}/v1/chat/completions", "-H", f"Authorization: Bearer {KEY}", "-d", body]  # fmt: skip
    with subprocess.Popen(curl) as raw:
        for name, client in asking.items():
            url, key = (litellm.url, litellm.MASTER_KEY) if name == "litellm" else (served.url, KEY)
            client.ask(url, key, COLD, ["stream"])
        whole.ask(served.url, KEY, COLD, ["chat"])
        for name, client in asking.items():
            said = client.outcomes().value("stream")
            assert (said["text"], said["in_pieces"]) == (CAPITAL.content, True), name
        assert whole.outcomes().value("chat")["text"] == CAPITAL.content
    assert raw.returncode == 0
    first, *_, last = [line for line in seen.read_text().splitlines() if line]
    assert first.startswith(f": waking {COLD} on ")
    assert last == "data: [DONE]"
    assert counted(served, "gateway_cold_starts_total", model=COLD, outcome="ready") == 1
    assert counted(served, "gateway_held_seconds_count", model=COLD) == len(asking) + 2
    assert counted(served, "gateway_held_seconds_bucket", le="0.1", model=COLD) == 0
