"""The self-test of `modal run -m service.server`: checks /health, then holds two conversations as two characters."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from service.errors import ServiceError
from service.registry.models import DEFAULT_ALIAS

CONTENT = "Explain the singular value decomposition."
CHARACTERS = (
    "You are a pirate who can't help but drop sly reminders that he went to Harvard.",
    "You are Jar Jar Binks.",
)
MAX_TOKENS = 512
TIMEOUT_S = 600.0
_CHAT = "/v1/chat/completions"
_HINT = "Read the container's log, which modal run prints above (without --quiet)."
Complete = Callable[[str, Any], tuple[int, Any]]


def run(complete: Complete, url: str | None, content: str, twice: bool, *, model: str | None = None) -> None:
    """Ask, print the answers, and check that there are any.

    With a proxy token in MODAL_KEY and MODAL_SECRET the answers are streamed from the web endpoint `url`; without one,
    which Modal would refuse there, they come through `complete`. `model` is None for the app's default.

    Raises:
        ServiceError: The service is not healthy, or gave no answer.
    """
    streamed = bool(url and os.environ.get("MODAL_KEY") and os.environ.get("MODAL_SECRET"))
    _print(f"Checking health {f'of {url}' if streamed else 'through Server.complete'}")
    status, answer = complete("/health", None)
    if (status, answer) != (200, {"status": "ok"}):
        raise ServiceError(f"/health answered {status} {answer!r}; expected 200 {{'status': 'ok'}}.", hint=_HINT)
    _print("Healthy")
    for character in CHARACTERS if twice else CHARACTERS[:1]:
        messages = [{"role": "system", "content": character}, {"role": "user", "content": content}]
        _print(f"Sending to {model or DEFAULT_ALIAS}: {json.dumps(messages)}")
        body = {"model": model or DEFAULT_ALIAS, "messages": messages, "max_tokens": MAX_TOKENS}
        answered = False
        for text in (
            _stream(str(url), {"model": model} if model else {}, body) if streamed else _complete(complete, body)
        ):
            answered = answered or bool(text.strip())
            sys.stdout.write(text)
            sys.stdout.flush()
        _print("")
        if not answered:
            raise ServiceError("The model's answer is empty.", hint=_HINT)


def _complete(complete: Complete, body: dict[str, Any]) -> Iterator[str]:
    status, answer = complete(_CHAT, body)
    if status != 200:
        raise ServiceError(f"{_CHAT} answered {status}: {answer!r}.", hint=_HINT)
    message = answer["choices"][0]["message"]
    yield message.get("reasoning") or ""
    yield message.get("content") or ""


def _stream(url: str, query: dict[str, str], body: dict[str, Any]) -> Iterator[str]:
    import httpx2  # noqa: PLC0415 - a container never streams to itself

    headers = {"Modal-Key": os.environ["MODAL_KEY"], "Modal-Secret": os.environ["MODAL_SECRET"]}
    request = {**body, "stream": True}
    with httpx2.stream("POST", url + _CHAT, params=query, json=request, headers=headers, timeout=TIMEOUT_S) as response:
        if response.status_code != 200:
            raise ServiceError(
                f"{url}{_CHAT} answered {response.status_code}: {response.read()[:500].decode(errors='replace')}.",
                hint=_HINT,
            )
        for line in response.iter_lines():
            data = line.removeprefix("data: ")
            if line.startswith("data: ") and data != "[DONE]":
                for choice in json.loads(data)["choices"]:
                    yield choice["delta"].get("reasoning") or choice["delta"].get("content") or ""


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
