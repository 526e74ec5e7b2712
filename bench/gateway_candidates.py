"""The candidates that the benchmark compares, each a process in front of the stub.

Our gateway, LiteLLM, nginx, and the routers in Rust of vLLM and SGLang. Each has one worker: one process, and of the
routers one thread. All check the client's key that can: ours, LiteLLM and SMG.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.gateway_server import ENGINE_KEY, MODEL
from bench.processes import free_port, killed_with_us
from tests.clients import client_env

KEY = "sk-of-the-benchmark"
UPSTREAM_KEY = "sk-of-the-upstream"
DIRECT, GATEWAY, LITELLM, NGINX = "direct", "gateway", "LiteLLM", "nginx"
ROUTER, SMG = "vllm-router", "SMG"
WITH_LEDGER, WITH_LIMITS = "gateway with the ledger", "gateway with limits"
LEDGER, KEYS = "usage.sqlite3", "keys.sqlite3"  # their files, in the benchmark's directory
# Every limit, and none that is reached.
LIMITS = {
    "requests_per_minute": 10**9,
    "tokens_per_minute": 10**12,
    "tokens_per_day": 10**15,
    "dollars_per_month": 1e12,
    "concurrency": 10**6,
    "expires": "2100-01-01",
    "models": [MODEL],
    "admin": True,
}
HOW_TO_GET_NGINX = "apt-get install -y nginx-light"
START_S, END_S = 150.0, 20.0
_POLL_S = 0.05
_OURS = ("SERVICE_", "API_KEY", "VLLM_", "LITELLM_", "OPENAI_")
_LITELLM_SETTINGS = {
    "litellm_settings": {"num_retries": 0, "request_timeout": 600, "set_verbose": False, "callbacks": []},
    "general_settings": {"master_key": "os.environ/LITELLM_MASTER_KEY"},
}
_VERSION = "from importlib.metadata import version; print(version('{}'))"
# What a proxy in front of an engine needs: no buffering, kept connections; one process, as for all candidates.
_NGINX_CONF = """\
daemon off; worker_processes 1; pid nginx.pid; error_log stderr warn;
events {{ worker_connections 8192; }}
http {{
  access_log off; client_max_body_size 64m; keepalive_requests 1000000000; tcp_nodelay on;
  upstream engine {{ server 127.0.0.1:{upstream}; keepalive 256; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
      proxy_read_timeout 600s;
    }}
  }}
}}
"""


class NotMeasuredError(Exception):
    """A candidate is not installed; the message says how to install it."""


@dataclass(frozen=True)
class Candidate:
    """A server that clients send requests to.

    Attributes:
        name: What the results call it.
        port: On loopback.
        key: Sent as a bearer token.
        model: Name of the model in requests.
        pid: The proxy's process id; 0 for the stub itself.
    """

    name: str
    port: int
    key: str
    model: str
    pid: int = 0

    @property
    def memory(self) -> tuple[float, float]:
        """Resident and proportional memory of the process and its children, in bytes."""
        sizes = [member.memory_full_info() for member in family(self.pid)]
        return sum(size.rss for size in sizes), sum(size.pss for size in sizes)


class Candidates:
    """Starts candidates and, when its context exits, stops them.

    Args:
        directory: Where their logs and configuration files go.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = ExitStack()
        self.upstream = free_port()

    def __enter__(self) -> Candidates:
        """Start the stub."""
        self._start("stub", [sys.executable, "-m", "bench.gateway_stub", str(self.upstream)], self.upstream)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop all processes."""
        self._stack.close()

    def start(self, name: str) -> Candidate:
        """Start the candidate of this name.

        Raises:
            NotMeasuredError: It is not installed.
        """
        if name == DIRECT:
            return Candidate(name, self.upstream, UPSTREAM_KEY, MODEL)
        starters = {
            GATEWAY: self._gateway,
            WITH_LEDGER: self._with_ledger,
            WITH_LIMITS: self._with_limits,
            LITELLM: self._litellm,
            NGINX: self._nginx,
            ROUTER: self._router,
            SMG: self._smg,
        }
        return starters[name](free_port())

    def _gateway(self, port: int, name: str = GATEWAY, options: Sequence[str] = (), **environment: str) -> Candidate:
        command = [sys.executable, "-m", "bench.gateway_server", "port", str(port), str(self.upstream), *options]
        pid = self._start(name, command, port, API_KEY=KEY, **{ENGINE_KEY: UPSTREAM_KEY}, **environment)
        return Candidate(name, port, KEY, MODEL, pid)

    def _with_ledger(self, port: int) -> Candidate:
        return self._gateway(port, WITH_LEDGER, ["--ledger", str(self._directory / LEDGER)])

    def _with_limits(self, port: int) -> Candidate:
        options = ["--keys", str(self._directory / KEYS), "--ledger", str(self._directory / f"limits-{LEDGER}")]
        return self._gateway(port, WITH_LIMITS, options, API_LIMITS=json.dumps({"default": LIMITS}))

    def _litellm(self, port: int) -> Candidate:
        upstream = {"api_base": f"http://127.0.0.1:{self.upstream}/v1", "api_key": UPSTREAM_KEY}
        models = [{"model_name": MODEL, "litellm_params": {"model": f"openai/{MODEL}", **upstream}}]
        file = self._directory / "litellm.yaml"  # every JSON is YAML
        file.write_text(json.dumps({"model_list": models, **_LITELLM_SETTINGS}))
        program = client_env.bin_directory() / "litellm"
        command = [str(program), "--config", str(file), "--host", "127.0.0.1", "--port", str(port)]
        quiet = {"LITELLM_LOG": "ERROR", "LITELLM_MODE": "PRODUCTION", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        pid = self._start(
            LITELLM,
            [*command, "--num_workers", "1", "--telemetry", "False"],
            port,
            "/health/liveliness",
            LITELLM_MASTER_KEY=KEY,
            **quiet,
        )
        return Candidate(LITELLM, port, KEY, MODEL, pid)

    def _nginx(self, port: int) -> Candidate:
        program = _nginx_program()
        if not program:
            raise NotMeasuredError(f"nginx is not installed: {HOW_TO_GET_NGINX}")
        file = self._directory / "nginx.conf"
        file.write_text(_NGINX_CONF.format(port=port, upstream=self.upstream))
        pid = self._start(NGINX, [program, "-p", str(self._directory), "-c", str(file)], port)
        return Candidate(NGINX, port, UPSTREAM_KEY, MODEL, pid)

    def _router(self, port: int) -> Candidate:
        # It takes a key for its workers only, and lets every client in.
        pid = self._rust(ROUTER, ["vllm-router", *self._options(port), "--log-level", "error"], port)
        return Candidate(ROUTER, port, UPSTREAM_KEY, MODEL, pid)

    def _smg(self, port: int) -> Candidate:
        # One key, which clients must have and which its workers get.
        command = ["smg", "launch", *self._options(port), "--log-level", "error", "--api-key", UPSTREAM_KEY]
        return Candidate(SMG, port, UPSTREAM_KEY, MODEL, self._rust(SMG, command, port))

    def _options(self, port: int) -> list[str]:
        worker, metrics = f"http://127.0.0.1:{self.upstream}", str(free_port())
        options = ["--host", "127.0.0.1", "--port", str(port), "--worker-urls", worker, "--policy", "round_robin"]
        return [*options, "--prometheus-port", metrics]

    def _rust(self, name: str, command: list[str], port: int) -> int:
        program, *options = command
        return self._start(name, [str(_routers() / program), *options], port, TOKIO_WORKER_THREADS="1")

    def _start(self, name: str, command: list[str], port: int, path: str = "/health", **environment: str) -> int:
        log = self._directory / f"{name}.log"
        return self._stack.enter_context(running(name, command, log, f"http://127.0.0.1:{port}{path}", **environment))


def installed() -> dict[str, str]:
    """Return the versions of the proxies that our gateway is compared with."""
    commands = {LITELLM: [str(client_env.bin_directory() / "python"), "-c", _VERSION.format("litellm")]}
    if program := _nginx_program():
        commands[NGINX] = [program, "-v"]
    with suppress(NotMeasuredError):
        python = str(_routers() / "python")
        for name, package in ((ROUTER, "vllm-router"), (SMG, "sglang-router")):
            commands[name] = [python, "-c", _VERSION.format(package)]
    return {name: _last_word(command) for name, command in commands.items()}


def _last_word(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return done.stdout.split()[-1].rpartition("/")[2]


def _nginx_program() -> str | None:
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


def _routers() -> Path:
    try:
        return client_env.routers()
    except (AssertionError, OSError) as error:
        reason = str(error).splitlines()[-1]
        raise NotMeasuredError(f"bench/routers.lock could not be installed: {reason}") from error


@contextmanager
def running(name: str, command: list[str], log: Path, health: str, **environment: str) -> Iterator[int]:
    """Start a server, wait until it is healthy, yield its process id; stop it and its children afterwards.

    Raises:
        SystemExit: It exited, or it was not healthy in time.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**kept, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    with killed_with_us(process.pid):
        try:
            deadline = time.monotonic() + START_S
            while not _healthy(health):
                if process.poll() is not None or time.monotonic() > deadline:
                    end = log.read_text(errors="replace")[-2000:]
                    raise SystemExit(f"{name} was not healthy (exit code {process.returncode}). Its output:\n{end}")
                time.sleep(_POLL_S)
            yield process.pid
        finally:
            _end(process)


def family(pid: int) -> list[psutil.Process]:
    """Return a process and its descendants."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def leave_core_to_engine(pid: int) -> None:
    """Let a service's threads run on every core, except those of the processes that run the model."""
    everywhere = os.sched_getaffinity(0)
    for member in family(pid):
        if not member.name().startswith("VLLM::"):  # EngineCore, Worker
            for thread in member.threads():
                os.sched_setaffinity(thread.id, everywhere)


def reset_peak(pid: int) -> None:
    """Reset the peak of a process's resident memory."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak(pid: int) -> float:
    """Return the peak of resident memory since `reset_peak`, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024.0 if found else 0.0


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    members = family(process.pid)[1:] if process.poll() is None else []
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for member in members:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(members, timeout=10)
