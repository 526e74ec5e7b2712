"""`bench` and `loadtest`: vLLM's own benchmark and Locust, on the real engine and on a service that fails."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from service.benchmarks import locust_run
from service.benchmarks.locust_run import Users
from tests.engine.running import ONE_THREAD, Service, wait_until
from tests.unit.tls import self_signed

from .clients import KEY
from .failing_service import CHUNKS, failing_service

COMMAND = Path(sys.executable).with_name("vllm-service")
END_S = 15
LOADS = {
    "bench": ["bench", "--requests", "40", "--concurrency", "4", "--input-tokens", "16"],
    "loadtest": ["loadtest", "-u", "4", "-r", "4", "-t", "4s", "--pause", "0", "--processes", "2"],
}


def environ(url: str) -> dict[str, str]:
    """Return the environment of a command that asks a service with a key."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SERVICE_", "VLLM_"))}
    return {**own, **ONE_THREAD, "COLUMNS": "80", "VLLM_GATEWAY_URL": url, "VLLM_API_KEY": KEY}


def started(directory: Path, url: str, *arguments: str) -> subprocess.Popen[str]:
    """Start the command with a key."""
    return subprocess.Popen(
        [str(COMMAND), *arguments, "--output-tokens", str(CHUNKS)],
        env=environ(url),
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(directory: Path, url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    with started(directory, url, *arguments) as process:
        out, err = process.communicate(timeout=180)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return what the command runs."""
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize("word", LOADS)
def test_measurement_of_the_real_engine_has_every_figure(word: str, served: Service, tmp_path: Path) -> None:
    """As JSON, and as a page; every request is answered."""
    done = run(tmp_path, f"{served.url}/v1", *LOADS[word], "--json", "--html", "load.html")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    answered, tokens = found["requests"]["answered"], found["tokens"]
    assert (answered >= 40 if word == "bench" else answered >= 4, found["errors"]) == (True, [])
    assert tokens["input"] > answered
    if word == "bench":
        assert (answered, tokens["output"]) == (40, 40 * CHUNKS)
    for name in ("ttft_s", "inter_token_s", "end_to_end_s"):
        assert 0 < found[name]["p50"] <= found[name]["p99"] <= found[name]["worst"] or name == "inter_token_s", found
    assert found["end_to_end_s"]["p50"] >= found["ttft_s"]["p50"]
    assert "<svg" in (tmp_path / "load.html").read_text()


@pytest.mark.parametrize(
    ("word", "errors"),
    [
        ("bench", {"503 Service Unavailable", "the stream ended before its last token", "ClientPayloadError"}),
        ("loadtest", {"503 model_waking", "in the stream: engine_lost", "HTTPParseError"}),
    ],
)
def test_measurement_counts_each_way_to_fail_and_ends_with_1(word: str, errors: set[str], tmp_path: Path) -> None:
    """Three of five requests fail: refused, failed within a stream, cut. The key is sent, and in no command line."""
    with failing_service() as (url, keys), started(tmp_path, url, *LOADS[word]) as process:
        lines: list[str] = []

        def is_loading() -> bool:
            lines.extend(part for one in descendants(process) for part in one.cmdline())
            return len(keys) > 0 and any("locust" in line or "vllm_service.bench" in line for line in lines)

        wait_until(is_loading, 60)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 1, out + err
    counted = {line.partition(" x ")[2].partition(": Res")[0].partition(": Inc")[0] for line in out.splitlines()} - {""}
    assert counted == errors
    (counts,) = re.findall(r"^([\d,]+) answered, ([\d,]+) failed in ", out, re.MULTILINE)
    answered, failed = map(int, counts)
    assert abs(failed * 2 - answered * 3) <= 4 * 5, out
    assert err.startswith(f"error: {failed} of {answered + failed} requests failed.")
    assert max(len(line) for line in out.splitlines()) <= 80
    assert keys == {f"Bearer {KEY}"}
    assert KEY not in " ".join(lines) + out + err


@pytest.mark.parametrize(
    ("word", "number"),
    [("bench", signal.SIGINT), ("loadtest", signal.SIGINT), ("loadtest", signal.SIGHUP), ("loadtest", signal.SIGTERM)],
)
def test_measurement_that_is_ended_leaves_nothing(word: str, number: signal.Signals, tmp_path: Path) -> None:
    """By Ctrl-C, with its terminal, or by `kill`: exit code 130, no traceback, and no load that goes on for an hour."""
    with failing_service() as (url, keys), started(tmp_path, url, *LOADS[word]) as process:
        running: list[psutil.Process] = []
        wait_until(lambda: bool(running.extend(descendants(process)) or (running and keys)), 60)
        process.send_signal(number)
        out, err = process.communicate(timeout=END_S)
    assert (process.returncode, out, err) == (130, "", "Stopped.\n")
    assert not [one for one in running if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("trusted", [True, False])
def test_users_send_the_key_over_tls_to_a_trusted_service_alone(
    trusted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locust's own default checks no certificate; SSL_CERT_FILE makes one known."""
    certificate = self_signed(tmp_path)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.file))
    with failing_service(certificate.server_context()) as (url, keys):
        users = Users(url, "m", 2, 2.0, 2, CHUNKS, pause_s=(0.2, 0.2))
        found = locust_run.run(locust_run.ensure_python(), users, KEY, lambda *_: None)
    assert found
    assert (keys == {f"Bearer {KEY}"}) is trusted
    assert any(not one.error for one in found) is trusted
    if not trusted:
        assert all("CERTIFICATE_VERIFY_FAILED" in one.error for one in found), found[0]
