"""Clients as their users run them: scripts in the environment of `client_env`, and LiteLLM's proxy."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import psutil
import requests
import yaml

from tests.engine.dialogues import TINY, TOOLS, completion, dialogue
from tests.engine.running import POLL_S, REPOSITORY, Service, free_port, wait_until

from . import client_env

SCRIPTS = client_env.HERE / "scripts"
EXAMPLE = REPOSITORY / "examples" / "litellm"
KEY = "sk-of-the-clients-3f9a"
FRAMEWORKS = ("aiohttp", "pydantic-ai", "instructor", "ai-sdk")  # each has a key of its own
COUNT = dialogue("count")  # a busy engine sends the few words of a short answer in one piece
PROMPT, CONTINUATION = completion("capital-raw")
CHOICES = ["Positive", "Negative", "Neutral"]
UNKNOWN = "tinny"  # nearest: tiny
COLD, BROKEN = "cold", "broken"  # models of `models_file`
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
JOHN = json.loads(dialogue("json").content)
CALL = dialogue("weather-call").tool_calls[0]
_ASKED = {
    "messages": COUNT.request["messages"],
    "prompt": PROMPT,
    "messages_for_schema": dialogue("json").request["messages"],
    "schema": PERSON,
    "messages_for_choice": [{"role": "user", "content": "Classify: vLLM is wonderful!"}],
    "choices": CHOICES,
    "messages_for_tools": dialogue("weather-call").request["messages"],
    "tools": list(TOOLS.values()),
    "unknown": UNKNOWN,
    "broken": BROKEN,
    "messages_too_long": [{"role": "user", "content": "hi " * 4000}],
}
_OURS = ("SERVICE_", "API_KEY", "VLLM_", "LITELLM_", "OPENAI_", "ANTHROPIC_", "LANGCHAIN_", "LANGSMITH_", "HF_")
_PROXY_START_S = 120  # about 10 s on two idle cores; the machine of a test is not always idle
_SCRIPT_S = 150
_EXAMPLE_CONFIG = ("litellm", "--url", "os.environ/VLLM_API_BASE", "--local")


def models_file(directory: Path) -> Path:
    """Write a models file with a model that no test has requested, and one whose files are missing."""
    file = directory / "models.toml"
    entry = f'path = "{TINY}"\nmax_model_len = 2048\ntool_call_parser = "hermes"\nreasoning_parser = "qwen3"\n'
    broken = f'[models.{BROKEN}]\npath = "no-such-directory"\nweights_gb = 0.004\n'
    file.write_text(f"[models.{COLD}]\n{entry}weights_gb = 0.004\n{broken}")
    return file


def agents_file(directory: Path) -> Path:
    """Write a models file with the agents' model, which also answers to the names of Anthropic's, and SmolLM2."""
    file = directory / "models.toml"
    file.write_text(
        f"""
        [models.agents]
        path = "{client_env.agents_model()}"
        weights_gb = 0.001
        max_model_len = 131072
        tool_call_parser = "hermes"
        [models.smollm2]
        path = "{client_env.smollm2()}"
        [aliases]
        "claude-*" = "agents"
        """
    )
    return file


class Outcomes(dict[str, dict[str, Any]]):
    """The results of a client's cases: what each returned, or what it raised."""

    def value(self, case: str) -> Any:
        """Return what a case returned; one that raised fails the test with the client's own message."""
        assert "value" in self[case], f"{case}: {self[case]}"
        return self[case]["value"]

    def raised(self, case: str) -> tuple[str, int | None, str]:
        """Return class, HTTP status and message of what a case raised."""
        assert "raised" in self[case], f"{case} raised nothing: {self[case]}"
        return self[case]["raised"], self[case]["status"], self[case]["message"]


def requests_until_it_gives_up(client: Client, served: Service) -> float:
    """Return how many requests a client with its own retries makes of a model that cannot start."""
    before = counted(served, "gateway_requests_total", key="clients", model=BROKEN, status="503")
    raised, status, message = outcomes(client, served.url, cases=["broken_model"]).raised("broken_model")
    assert status == 503, (raised, message)
    assert "has no config.json" in message
    return counted(served, "gateway_requests_total", key="clients", model=BROKEN, status="503") - before


class Client:
    """A script of a client, in a process of its own, which has imported what it needs and waits for its cases."""

    def __init__(self, command: list[str], directory: Path | None = None) -> None:
        self._name, pipe = command[-1], subprocess.PIPE
        self._process = subprocess.Popen(
            command, cwd=directory, env=environment(), stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )
        assert self._process.stderr is not None
        while (line := self._process.stderr.readline()) != "ready\n":
            assert line, f"{self._name} ended before it was ready"

    def ask(self, url: str, key: str, model: str, cases: list[str] | None = None) -> None:
        """Tell it what to ask, all cases by default."""
        assert self._process.stdin is not None
        asked = _ASKED | {"url": url, "key": key, "model": model, "cases": cases}
        self._process.stdin.write(json.dumps(asked))
        self._process.stdin.close()
        self._process.stdin = None

    def outcomes(self) -> Outcomes:
        """Return what became of the cases."""
        try:
            out, err = self._process.communicate(timeout=_SCRIPT_S)
        finally:
            self._process.kill()
        assert self._process.returncode == 0, f"{self._name} ended with {self._process.returncode}:\n{err}"
        return Outcomes(json.loads(out))


def python(script: str, directory: Path | None = None) -> Client:
    """Start a script for Python, in the tests' working directory by default."""
    return Client([str(client_env.bin_directory() / "python"), str(SCRIPTS / script)], directory)


def javascript(directory: Path, script: str) -> Client:
    """Start a script for Node, in a directory in which it finds its packages."""
    return Client([client_env.node(), str(beside_packages(directory, (SCRIPTS / script).read_text()))], directory)


def outcomes(client: Client, url: str, key: str = KEY, model: str = "tiny", cases: list[str] | None = None) -> Outcomes:
    """Have a client ask, and return what became of it."""
    client.ask(url, key, model, cases)
    return client.outcomes()


def beside_packages(directory: Path, program: str) -> Path:
    """Put a program for Node where it finds its packages: Node looks for them beside the file."""
    packages = directory / "node_modules"
    if not packages.exists():
        packages.symlink_to(client_env.node_modules(), target_is_directory=True)
    file = directory / "program.mjs"
    file.write_text(program)
    return file


def environment(**more: str) -> dict[str, str]:
    """Return the test's own environment less all that could tell a client something."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_OURS)} | more


@contextlib.contextmanager
def sink() -> Iterator[socket.socket]:
    """Listen as a proxy that takes connections and answers none; `accept` raises BlockingIOError when there is none."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


def key_of(name: str) -> str:
    """Return the key of the client of this name."""
    return f"sk-of-{name}-8d21"


def api_keys(names: Iterable[str]) -> str:
    """Return the service's setting of keys: one for each of these clients, and the one of all others."""
    return ",".join([f"clients={KEY}", *(f"{name}={key_of(name)}" for name in names)])


def bearer(key: str) -> dict[str, str]:
    """Return the header that carries a key."""
    return {"Authorization": f"Bearer {key}"}


def logged(service: Service, key: str, count: int) -> list[dict[str, Any]]:
    """Return the gateway's lines of the requests that had a key, as soon as there are so many, or more."""
    found: list[dict[str, Any]] = []

    def enough() -> bool:
        found[:] = [line for line in service.access_log if line["key"] == key]
        return len(found) >= count

    wait_until(enough, 10, service)
    return found


def counted(served: Service, metric: str, **labels: str) -> float:
    """Return what the gateway's `/metrics` has for a metric with exactly these labels; 0 when it is not there yet."""
    text = requests.get(f"{served.url}/metrics", headers=bearer(KEY), timeout=30).text
    written = ",".join(f'{name}="{value}"' for name, value in sorted(labels.items()))
    found = re.search(rf"^{metric}\{{{re.escape(written)}\}} (\S+)$", text, re.M)
    return float(found[1]) if found else 0.0


class LiteLLM:
    """LiteLLM's proxy, started as the example's compose file has it: its command, its environment.

    Args:
        directory: Where its configuration and its output go.
        gateway: URL of the gateway.
        models: The models file of the gateway.
        writes: The words of the command that write its configuration, as the example has it by default.
        more: Variables set beside those of the compose file.
    """

    MASTER_KEY = "sk-of-litellm-71c2"

    def __init__(
        self, directory: Path, gateway: str, models: Path, writes: Sequence[str] = _EXAMPLE_CONFIG, **more: str
    ) -> None:
        self._file, self._log = directory / "config.yaml", directory / "litellm.log"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        service = yaml.safe_load((EXAMPLE / "compose.yaml").read_text())["services"]["litellm"]
        given = {"VLLM_GATEWAY_URL": gateway, "MODAL_WORKSPACE": "unused"}
        given |= {"VLLM_API_KEY": KEY, "LITELLM_MASTER_KEY": self.MASTER_KEY}
        self._environment = environment(**compose_environment(service, given), **more)
        replaced = {"/app/config.yaml": str(self._file), "4000": str(self.port), "0.0.0.0": "127.0.0.1"}
        arguments = [replaced.get(word, word) for word in service["command"]]
        self._command = [str(client_env.bin_directory() / "litellm"), *arguments]
        given = {"SERVICE_MODELS_FILE": str(models), "VLLM_GATEWAY_URL": gateway, "VLLM_API_KEY": KEY}
        self._writes, self._written = [*writes, "--output", str(self._file)], environment(**given)
        self.started_after_s = 0.0

    def __enter__(self) -> Self:
        """Write the configuration, start the proxy and wait until it listens."""
        write = [sys.executable, "-m", "service.cli.main", *self._writes]
        subprocess.run(write, cwd=REPOSITORY, env=self._written, check=True)
        began = time.monotonic()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, env=self._environment, cwd=self._file.parent, stdout=log, stderr=log
            )
        try:
            while not self._listens():
                assert self._process.poll() is None, self.story
                assert time.monotonic() - began < _PROXY_START_S, self.story
                time.sleep(POLL_S)
        except BaseException:
            self.__exit__()
            raise
        self.started_after_s = time.monotonic() - began
        return self

    def __exit__(self, *_: object) -> None:
        """End it; it has no children."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def story(self) -> str:
        """Its output, for the message of a failed test."""
        return f"LiteLLM's proxy, {' '.join(self._command)}:\n{self._log.read_text(errors='replace')[-6000:]}"

    @property
    def config(self) -> str:
        """The file that it was started with."""
        return self._file.read_text()

    @property
    def memory_mb(self) -> float:
        """Its resident memory."""
        return float(psutil.Process(self._process.pid).memory_info().rss / 1e6)

    def _listens(self) -> bool:
        try:
            return requests.get(f"{self.url}/health/liveliness", timeout=5).ok
        except requests.RequestException:
            return False


def compose_environment(service: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, str]:
    """Return a service's environment with `${NAME}`, `${NAME:?…}` and `${NAME:-…}` filled in as compose does."""

    def filled(match: re.Match[str]) -> str:
        name, operator, rest = match[1], match[2] or "", match[3] or ""
        assert given.get(name) or operator == ":-", f"compose would stop, or warn: {name} is not set"
        return given.get(name) or rest

    def value(text: str) -> str:
        while (inner := re.sub(r"\$\{(\w+)(?:(:[?-])([^{}]*))?\}", filled, text)) != text:  # innermost first
            text = inner
        return text

    return {name: value(text) for name, text in service["environment"].items()}
