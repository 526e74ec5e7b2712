"""The loop of Modal's vLLM example: it reads a stream line by line and knows `data: ` and `[DONE]`, no more."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
from cases import ASKED, case, run


async def _stream() -> list[str]:
    pieces = []
    headers = {"Authorization": f"Bearer {ASKED['key']}", "Accept": "text/event-stream"}
    payload = {"messages": ASKED["messages"], "model": ASKED["model"], "stream": True}
    async with aiohttp.ClientSession(base_url=ASKED["url"]) as session:
        async with session.get("/health", timeout=aiohttp.ClientTimeout(60)) as health:
            health.raise_for_status()
        async with session.post("/v1/chat/completions", json=payload, headers=headers) as answer:
            async for raw in answer.content:
                answer.raise_for_status()
                line = raw.decode().strip()
                if not line or line == "data: [DONE]":
                    continue
                if line.startswith("data: "):
                    line = line[len("data: ") :]
                chunk = json.loads(line)
                assert chunk["object"] == "chat.completion.chunk"
                pieces.append(chunk["choices"][0]["delta"].get("content") or "")
    return pieces


@case
def stream() -> Any:
    """An answer in pieces."""
    pieces = [piece for piece in asyncio.run(_stream()) if piece]
    return {"text": "".join(pieces).strip(), "in_pieces": len(pieces) > 1}


run()
