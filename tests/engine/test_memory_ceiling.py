"""An engine that may take little memory: what does not fit in its API server fails alone, in its core the core ends."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from service.engine import process
from service.engine.environment import EngineEnv
from service.in_engine.vllm_service.http_contract import MIB

from .guarded import KEYS, Guarded, guarded

GROWTH = 64 * MIB
LARGE = 30 * MIB  # with its copies on the way through server, guard and vLLM it is three times as much


@pytest.fixture
def small(engine_env_: EngineEnv, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guarded]:
    """An engine that may grow by 64 MiB."""
    monkeypatch.setattr(process, "growth_bytes", lambda: GROWTH)
    with guarded(engine_env_, KEYS) as engine:
        yield engine


def post(engine: Guarded, prompt: str) -> requests.Response:
    """Ask for one token."""
    body: dict[str, Any] = {"model": "llm", "prompt": prompt, "max_tokens": 1}
    return requests.post(f"{engine.url}/v1/completions", json=body, headers=engine.headers, timeout=120)


def test_request_over_the_ceiling_fails_alone_and_the_engine_goes_on(small: Guarded) -> None:
    """Several at a time too; the kernel would take any of its processes before the service, by their scores."""
    before = psutil.Process(small.pid).memory_info().rss
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: _status(small), range(16)))
    after = post(small, "Hello")

    assert after.status_code == 200, after.text
    assert {"engine_error", "closed"} & {*answers}, answers  # by whether the server or the guard had no memory first
    assert set(answers) <= {"engine_error", "context_length_exceeded", "closed"}
    assert psutil.Process(small.pid).memory_info().rss < before + 2 * GROWTH
    family = [psutil.Process(small.pid), *psutil.Process(small.pid).children(recursive=True)]
    assert {Path(f"/proc/{member.pid}/oom_score_adj").read_text().strip() for member in family} == {"500"}


def test_core_over_its_ceiling_ends_with_its_requests_told(
    engine_env_: EngineEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may take no byte more than after its boot; the machine has as much memory as before."""
    monkeypatch.setattr(process, "core_growth_bytes", lambda: 0)
    with guarded(engine_env_, KEYS) as engine:
        leader = psutil.Process(engine.pid)
        core = next(child for child in leader.children() if "EngineCore" in " ".join(child.cmdline()))
        limit, _ = core.rlimit(psutil.RLIMIT_DATA)
        assert 0 < limit < 4 << 30
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda number: _status(engine, f"{number} " * 300), range(64)))

        assert set(answers) <= {"ok", "engine_lost", "closed"}
        assert "engine_lost" in answers
        psutil.wait_procs([core], 10)
        assert not core.is_running() or core.status() == psutil.STATUS_ZOMBIE


def _status(engine: Guarded, prompt: str = "a" * LARGE) -> str:
    """Return the code of the answer to a request; `closed`: its connection ended, or the engine has."""
    try:
        answer = post(engine, prompt)
    except requests.ConnectionError:
        return "closed"
    if answer.status_code == 200:
        return "ok"
    assert answer.headers["content-type"] == "application/json", (answer.status_code, answer.text)
    return str(answer.json()["error"]["code"])
