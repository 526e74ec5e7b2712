"""The holds of the real engine: at ASLEEP it is built and has answered, and has no port; then it wakes the same."""

from __future__ import annotations

import json
import os
import socket
import urllib.request
from typing import Any

from service.engine import environment
from service.engine.args import EngineOptions, engine_command
from service.engine.process import EngineProcess, State
from service.registry.models import Registry

from .dialogues import dialogue
from .running import BOOT_S, free_port


def test_engine_held_asleep_has_no_port_and_wakes_with_the_same_canary() -> None:
    """Built, warmed and asleep without a listener; after the release it wakes, repeats its canary and serves."""
    env = environment.ensure()
    spec = Registry.load().specs["tiny"]
    assert spec.directory
    port = free_port()
    command = engine_command(
        spec,
        spec.directory,
        EngineOptions(port=port),
        default_key="tiny",
        device=env.device,
        parent_env=os.environ,
    )
    events: dict[str, dict[str, Any]] = {}
    engine = EngineProcess(command, python=env.python, hold="asleep", on_event=events.__setitem__)
    engine.spawn()
    try:
        engine.wait_for(State.ASLEEP, BOOT_S)
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
        engine.release()
        engine.wait_for(State.READY, BOOT_S)
        assert events["woken"]["different"] is None
        assert events["woken"]["tokens"] == events["canary"]["tokens"]
        assert events["canary"]["tokens"]
        asked = dialogue("capital")
        body = json.dumps({"model": "llm", **asked.request}).encode()
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            assert json.load(answer)["choices"][0]["message"]["content"] == asked.content
    finally:
        engine.stop(5)
    assert engine.state is State.STOPPED
