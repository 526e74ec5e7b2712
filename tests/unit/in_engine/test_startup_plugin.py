"""The steps before vLLM listens."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest
from vllm_service import startup_plugin


def test_failure_of_the_last_steps_is_reported_as_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing ends the process by a signal while vLLM ends its core: "KeyboardInterrupt: terminated" hid the cause."""

    async def done(*_: object) -> None:
        """Do nothing."""

    def fail(_: Any) -> None:
        raise RuntimeError("no such method")

    def nothing(*_: object) -> None:
        """Do nothing."""

    for name, step in (("_generate_and_hold", done), ("_renew_randomness", done), ("client_shares.enable", fail)):
        monkeypatch.setattr(f"vllm_service.startup_plugin.{name}", step)
    for name in ("engine_errors.watch", "bad_requests.shorten_log", "end_signals.end"):
        monkeypatch.setattr(f"vllm_service.startup_plugin.{name}", nothing)
    monkeypatch.setattr("vllm_service.parent_pipe.current", lambda: SimpleNamespace(release={}))

    async def run() -> None:
        plugin = startup_plugin.StartupPlugin()
        with pytest.raises(RuntimeError, match="no such method"):
            await plugin.init_state(SimpleNamespace(errored=False), SimpleNamespace(), Namespace())
        await asyncio.wait([plugin._watch], timeout=1)
        assert plugin._watch.cancelled()

    asyncio.run(run())
