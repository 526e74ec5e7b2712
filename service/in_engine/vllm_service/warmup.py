"""Warm-up before a GPU snapshot: requests as users send them, so that what is compiled on first use is compiled.

They go through vLLM's own chat handler, without a port: template, tokenizer, grammar compiler, image processor, and the
kernels of each shape. They cost nothing after the snapshot, so they are thorough. A request that fails is only
reported, since not every model takes every one.
"""

from __future__ import annotations

import asyncio
import base64
import struct
import zlib
from typing import Any

LIMIT_S = 600.0  # of a request: the first of its kind compiles
SHORT_TOKENS = 16
BATCH = 8
LONG_PROMPT = 3  # times what one step takes, within the context: a prompt that is cut into chunks
IMAGE_PIXELS = 448
_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


async def warm_up(engine: Any, state: Any) -> list[str]:
    """Send them, and return what failed: `image: <reason>`."""
    chat = getattr(state, "openai_serving_chat", None)
    if chat is None:
        return []
    failures = []
    for name, bodies in _requests(engine).items():
        sent = (asyncio.wait_for(_send(chat, body), LIMIT_S) for body in bodies)
        done = await asyncio.gather(*sent, return_exceptions=True)
        failures += [f"{name}: {answer}" for answer in done if isinstance(answer, Exception)][:1]
    return failures


def _requests(engine: Any) -> dict[str, list[dict[str, Any]]]:
    config = engine.model_config
    step = engine.vllm_config.scheduler_config.max_num_batched_tokens
    room = config.max_model_len - 4 * SHORT_TOKENS
    short = _chat("Hello.")
    # without reasoning: the grammar would begin only after it
    structured = {
        "chat_template_kwargs": {"enable_thinking": False},
        "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": _SCHEMA}},
    }
    requests = {
        "short prompt": [short],
        "long prompt": [_chat("Hello. " * (min(LONG_PROMPT * step, room) // 4), tokens=4)],  # a word is 1 or 2 tokens
        "batch": [_chat(f"Tell me about the number {number}.") for number in range(BATCH)],
        "structured output": [{**short, **structured, "max_tokens": 4 * SHORT_TOKENS}],
    }
    if _takes_images(config):
        image = {"type": "image_url", "image_url": {"url": _picture()}}
        requests["image"] = [_chat([{"type": "text", "text": "What is this?"}, image])]
    return requests


def _chat(content: Any, tokens: int = SHORT_TOKENS) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": tokens, "temperature": 0.7}


async def _send(chat: Any, body: dict[str, Any]) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionResponse

    answer = await chat.create_chat_completion(ChatCompletionRequest.model_validate(body))
    if not isinstance(answer, ChatCompletionResponse):
        raise RuntimeError(answer.error.message)  # noqa: TRY004 - an error answer, not a wrong type


def _takes_images(config: Any) -> bool:
    multimodal = config.multimodal_config
    return bool(config.is_multimodal_model and multimodal and multimodal.get_limit_per_prompt("image"))


def _picture() -> str:
    """Return a grey square as the URL of a PNG."""
    rows = (b"\0" + b"\x80" * 3 * IMAGE_PIXELS) * IMAGE_PIXELS
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", IMAGE_PIXELS, IMAGE_PIXELS, 8, 2, 0, 0, 0),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    )
    return "data:image/png;base64," + base64.b64encode(png).decode()
