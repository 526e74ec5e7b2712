"""One request to the engine in this container, for the methods of `Server`: no web endpoint, no proxy token."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import aiohttp

from service.in_engine.vllm_service import usage_report
from service.in_engine.vllm_service.http_contract import CLIENT_HEADER
from service.in_engine.vllm_service.usage_report import USAGE_HEADER, EngineUsage
from service.registry.entries import ModelSpec
from service.usage import money
from service.usage.records import UsageRecord

_LOST = {"message": "The engine died or broke the connection off.", "type": "server_error", "code": "engine_lost"}


async def request(port: int, path: str, body: Any | None, key: str | None = None) -> tuple[int, Any]:
    """POST `body` as JSON to the engine's `path` (GET when it is None) and return status and parsed answer.

    An answer that is no JSON is returned as text. Cancelling this coroutine closes the connection, and then the engine
    stops generating.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = f"http://127.0.0.1:{port}/{path.lstrip('/')}"
    method = "GET" if body is None else "POST"
    timeout = aiohttp.ClientTimeout(total=None)  # Modal's own limit on the call is the limit
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.request(method, url, json=body, headers=headers) as answer,
    ):
        text = await answer.text()
        try:
            return answer.status, json.loads(text)
        except json.JSONDecodeError:
            return answer.status, text


@dataclass(frozen=True)
class LineAnswer:
    """The engine's answer to a line of a batch, and what it used; `usage` is None where the engine told nothing."""

    status: int
    body: bytes
    usage: EngineUsage | None
    retry_after_s: float | None
    request_id: str
    seconds: float

    def record(self, client: str, replica: str, spec: ModelSpec, dollars_per_hour: float) -> UsageRecord:
        """Return its row of the ledger."""
        usage = self.usage
        share = money.cost(usage, dollars_per_hour)
        return UsageRecord(
            at=time.time(),
            key=client,
            model=spec.key,
            tokens_in=usage and usage.tokens_in,
            tokens_cached=usage and usage.tokens_cached,
            tokens_out=usage and usage.tokens_out,
            seconds=self.seconds,
            status=self.status,
            replica=replica,
            cost=share,
            dollars=money.dollars(usage, spec.price, share),
        )

    def as_fields(self, dollars: float | None) -> dict[str, Any]:
        """Return the fields of the worker's `Answer`."""
        return {
            "status": self.status,
            "body": self.body,
            "request_id": self.request_id,
            "retry_after_s": self.retry_after_s,
            "tokens_in": self.usage.tokens_in if self.usage else 0,
            "tokens_out": self.usage.tokens_out if self.usage else 0,
            "dollars": dollars or 0.0,
        }


async def request_line(port: int, path: str, body: bytes, key: str | None, client: str) -> LineAnswer:
    """POST the body of a line to the engine, in the name of a client; an engine that is gone is a 502."""
    headers = {CLIENT_HEADER.decode(): quote(client), "Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    began = time.monotonic()
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session,
            session.post(f"http://127.0.0.1:{port}{path}", data=body, headers=headers) as answer,
        ):
            text = await answer.read()
            retry = answer.headers.get("Retry-After", "")
            return LineAnswer(
                answer.status,
                text,
                usage_report.parse(answer.headers.get(USAGE_HEADER.decode(), "").encode()),
                float(retry) if retry.isdigit() else None,
                answer.headers.get("X-Request-Id", ""),
                time.monotonic() - began,
            )
    except aiohttp.ClientError:
        lost = json.dumps({"error": _LOST}).encode()
        return LineAnswer(502, lost, None, None, "", time.monotonic() - began)
