"""Sends lines of a batch to a gateway, as any client does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

import aiohttp
import msgspec

from service.batch.lines import Line
from service.batch.worker import Answer, Send
from service.cli.chat_answer import REPORT_COST
from service.cli.gateways import Gateway
from service.errors import ServiceError

_CONNECT_S = 30.0
_REDIRECTS = 1000  # Modal's: one each 150 s that an answer takes
_COST = "X-Cost-Usd"


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None


class _Error(msgspec.Struct):
    code: str | int | None = None


class _Body(msgspec.Struct):
    usage: _Usage | None = None
    error: _Error | None = None


_BODY = msgspec.json.Decoder(_Body)


@asynccontextmanager
async def to_gateway(gateway: Gateway, answer_s: float) -> AsyncIterator[Send]:
    """Give what sends a line to a gateway.

    Args:
        gateway: Where, and with which key.
        answer_s: How long it may be silent.
    """
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=answer_s)
    headers = {"Content-Type": "application/json", **REPORT_COST}
    if gateway.key:
        headers["Authorization"] = f"Bearer {gateway.key}"
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, headers=headers, connector=connector) as session:

        async def send(line: Line) -> Answer:
            try:
                async with session.post(gateway.url + line.url, data=line.body, max_redirects=_REDIRECTS) as response:
                    body = await response.read()
            except aiohttp.ClientConnectorError as error:
                raise ConnectionRefusedError(f"{gateway.url} cannot be reached: {error.strerror}") from error
            except aiohttp.ClientError as error:
                raise ConnectionError(f"{gateway.url} broke the connection off: {error}") from error
            if response.status == 401:
                raise ServiceError(
                    f"{gateway.url} no longer takes the key in VLLM_API_KEY (401).",
                    hint="Set it to one that it takes; the same command goes on.",
                )
            return answer_of(response.status, body, response.headers)

        yield send


def answer_of(status: int, body: bytes, headers: Mapping[str, str]) -> Answer:
    """Return an answer with what it tells of itself."""
    found = _Body()
    with suppress(msgspec.DecodeError, UnicodeDecodeError):
        found = _BODY.decode(body)
    usage = found.usage or _Usage()
    return Answer(
        status,
        body,
        request_id=headers.get("X-Request-Id", ""),
        retry_after_s=_number(headers.get("Retry-After")),
        code=str(found.error.code) if found.error and found.error.code is not None else None,
        tokens_in=usage.prompt_tokens or usage.input_tokens or 0,
        tokens_out=usage.completion_tokens or usage.output_tokens or 0,
        dollars=_number(headers.get(_COST)) or 0.0,
    )


def _number(text: str | None) -> float | None:
    with suppress(ValueError):
        return max(0.0, float(text or ""))
    return None
