"""What a user of the load test does: asks a question, reads the stream to its end, pauses.

Locust runs this file, here and in Modal's containers; it needs Locust and nothing of the service. The variable
LOADTEST_JOB has the job, VLLM_API_KEY the key; each process writes a line a request to a file of its own.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import ssl
import time
from http import HTTPStatus
from pathlib import Path
from typing import Any

from locust import FastHttpUser, between, task
from locust.contrib.fasthttp import FAILURE_EXCEPTIONS

JOB = json.loads(os.environ["LOADTEST_JOB"])
KEY = os.environ.get("VLLM_API_KEY", "")
SYSTEM = "You are a helpful assistant."
QUESTIONS = (
    "Give me two fun date ideas.",
    "What is the capital of France?",
    "Explain quantum computing in simple terms.",
    "Explain the singular value decomposition.",
    "Write a haiku about the sea.",
    "List three colors.",
    "How does a bicycle stay upright?",
    "What should I cook for six friends tonight?",
)


class ChatUser(FastHttpUser):  # type: ignore[misc] # Locust is not in the light environment
    """A user of the chat API."""

    wait_time = between(*JOB["pause_s"])
    connection_timeout = network_timeout = JOB["timeout_s"]
    insecure = False  # Locust's default checks no certificate
    ssl_context_factory = staticmethod(lambda cafile=None: _ssl_context(cafile))

    @task  # type: ignore[untyped-decorator] # Locust's
    def chat(self) -> None:
        """Ask a question and keep what the answer took; a request that the end of the test cuts is not counted."""
        measured = Measured(time.monotonic())
        try:
            with self.client.request(
                "POST", "/v1/chat/completions", data=_body(), headers=_headers(), stream=True, catch_response=True
            ) as response:
                measured.read(response)
                if measured.error:
                    response.failure(measured.error)
        except (*FAILURE_EXCEPTIONS, ValueError) as failed:
            measured.error = _named(failed)
        measured.write()


def _ssl_context(cafile: str | None) -> ssl.SSLContext:
    """Return a context that trusts `cafile`, and what this machine trusts (SSL_CERT_FILE)."""
    context = ssl.create_default_context(cafile=cafile)
    context.load_default_certs()
    return context


class Measured:
    """What one request took."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.arrivals: list[float] = []
        self.usage: dict[str, int] = {}
        self.error = ""

    def read(self, response: Any) -> None:
        """Read an answer to its end."""
        if response.status_code != 200:
            self.error = _refusal(response)
            return
        while line := response.stream.readline(b"\n"):
            if line.startswith(b"data: [DONE]"):
                break
            if line.startswith(b"data: "):
                event = json.loads(line[6:])
                if error := event.get("error"):
                    self.error = f"in the stream: {error.get('code') or error.get('type')}"
                    return
                if event.get("choices"):
                    self.arrivals.append(time.monotonic())
                self.usage = event.get("usage") or self.usage
        if not self.usage:
            self.error = "the stream ended before its last token"

    def write(self) -> None:
        """Append the record to this process's file."""
        times = [self.began, *self.arrivals]
        gaps = [round(later - earlier, 6) for earlier, later in itertools.pairwise(times)]
        end = times[-1] if self.arrivals and not self.error else time.monotonic()
        record = {
            "start_s": self.began,
            "ttft_s": gaps[0] if gaps else 0.0,
            "gaps_s": gaps[1:],
            "latency_s": end - self.began,
            "input_tokens": self.usage.get("prompt_tokens", 0),
            "output_tokens": self.usage.get("completion_tokens", 0),
            "error": self.error,
        }
        with Path(JOB["directory"], f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


def _body() -> bytes:
    question = random.choice(QUESTIONS)  # noqa: S311 - no secret
    body = {
        "model": JOB["model"],
        "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
        "max_tokens": JOB["output_tokens"],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(body).encode()


def _headers() -> dict[str, str]:
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream", "Accept-Encoding": "identity"}
    return headers | ({"Authorization": f"Bearer {KEY}"} if KEY else {})


def _refusal(response: Any) -> str:
    if not response.status_code:
        failed = getattr(response, "error", None)
        return _named(failed)
    try:
        code = json.loads(response.content)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        code = ""
    return f"{response.status_code} {code or HTTPStatus(response.status_code).phrase}"


def _named(failed: BaseException | None) -> str:
    return f"{type(failed).__name__}: {failed}"[:120]
