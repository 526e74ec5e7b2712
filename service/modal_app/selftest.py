"""The built-in test of `modal run -m service.server`: health, then two conversations with two characters."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from service.errors import ServiceError

CONTENT = "Explain the singular value decomposition."
CHARACTERS = (
    "You are a pirate who can't help but drop sly reminders that he went to Harvard.",
    "You are Jar Jar Binks.",
)
MAX_TOKENS = 512
_LOOK = "Look at the container's log: modal app logs <app>."
Complete = Callable[[str, Any], tuple[int, Any]]


def run(complete: Complete, url: str | None, content: str, twice: bool) -> None:
    """Ask, print and check.

    With a proxy token in MODAL_KEY and MODAL_SECRET the answers are streamed over the web endpoint `url`; without one,
    which Modal would refuse there, they come through `complete`.

    Raises:
        ServiceError: The service is not healthy, or gave no answer.
    """
    streamed = bool(url and os.environ.get("MODAL_KEY") and os.environ.get("MODAL_SECRET"))
    _say(f"Checking health {'of ' + str(url) if streamed else 'through Server.complete'}")
    status, answer = complete("/health", None)
    if (status, answer) != (200, {"status": "ok"}):
        raise ServiceError(f"/health answered {status} {answer!r}; expected 200 and status ok.", hint=_LOOK)
    _say("Healthy")
    for character in CHARACTERS if twice else CHARACTERS[:1]:
        messages = [{"role": "system", "content": character}, {"role": "user", "content": content}]
        _say(f"Sending to llm: {json.dumps(messages)}")
        body = {"model": "llm", "messages": messages, "max_tokens": MAX_TOKENS}
        words = _stream(str(url), body) if streamed else _whole(complete, body)
        said = ""
        for word in words:
            said += word
            sys.stdout.write(word)
            sys.stdout.flush()
        _say("")
        if not said.strip():
            raise ServiceError("The model's answer is empty.", hint=_LOOK)


def _whole(complete: Complete, body: dict[str, Any]) -> Iterator[str]:
    status, answer = complete("/v1/chat/completions", body)
    if status != 200:
        raise ServiceError(f"/v1/chat/completions answered {status}: {answer!r}", hint=_LOOK)
    message = answer["choices"][0]["message"]
    yield message.get("reasoning") or ""
    yield message.get("content") or ""


def _stream(url: str, body: dict[str, Any]) -> Iterator[str]:
    import requests  # noqa: PLC0415 - not needed in the container

    headers = {"Modal-Key": os.environ["MODAL_KEY"], "Modal-Secret": os.environ["MODAL_SECRET"]}
    target = f"{url}/v1/chat/completions"
    with requests.post(target, json={**body, "stream": True}, headers=headers, stream=True, timeout=600) as answer:
        if answer.status_code != 200:
            raise ServiceError(f"{target} answered {answer.status_code}: {answer.text[:500]}", hint=_LOOK)
        for line in answer.iter_lines():
            data = line.removeprefix(b"data: ")
            if line.startswith(b"data: ") and data != b"[DONE]":
                for choice in json.loads(data)["choices"]:
                    yield choice["delta"].get("reasoning") or choice["delta"].get("content") or ""


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
