"""Asks a gateway from outside, as clients do: for its models as it lists them, and for a chat, which wakes a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import quote, urlsplit

import httpx2

from service.errors import ServiceError, UsageError, one_line
from service.ports import is_loopback

_CHAT = "/v1/chat/completions"
_LOG = "Read its log: vllm-service logs; that of a model's replicas: vllm-service logs MODEL."
QUESTION = "What is the capital of France?"
_LIST_TIMEOUT_S = 180.0  # a container of the gateway starts in seconds, its first image takes longer


def _ignore(_: str) -> None:
    pass


def health(url: str) -> None:
    """Insist on an answer to `GET /health`, which needs no key.

    Raises:
        ServiceError: There is none.
    """
    _ask("GET", f"{url}/health", "", None, _LIST_TIMEOUT_S)


def models(url: str, key: str) -> list[dict[str, Any]]:
    """Return what `GET /v1/models` lists.

    Raises:
        ServiceError: It does not.
    """
    found = _ask("GET", f"{url}/v1/models", key, None, _LIST_TIMEOUT_S)
    listed = found.get("data") if isinstance(found, dict) else None
    if not isinstance(listed, list):
        raise _no_gateway(f"{url}/v1/models", "it has no list of models")
    return listed


def model(url: str, key: str, name: str) -> dict[str, Any]:
    """Return how `GET /v1/models/{id}` describes a model, by any of its names.

    Raises:
        UsageError: The name is not UTF-8.
        ServiceError: It does not.
    """
    try:
        quoted = quote(name)
    except UnicodeEncodeError:
        raise UsageError("The name of the model is not UTF-8.", hint="vllm-service models lists the names.") from None
    found = _ask("GET", f"{url}/v1/models/{quoted}", key, None, _LIST_TIMEOUT_S)
    if not isinstance(found, dict) or "state" not in found:
        raise _no_gateway(f"{url}/v1/models/{name}", "it tells no state of the model")
    return found


def key_name(url: str, key: str) -> str:
    """Return the name of a key.

    Raises:
        ServiceError: The gateway does not know it.
    """
    return str(_ask("GET", f"{url}/v1/key", key, None, _LIST_TIMEOUT_S)["name"])


def chat(url: str, key: str, model: str, timeout_s: float) -> str:
    """Return a model's answer to a question; its GPU is woken for it.

    Raises:
        ServiceError: There is none.
    """
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 512}
    events = stream(url, key, body, timeout_s)
    text = "".join(text_of(choice["delta"]) for event in events for choice in event["choices"])
    if not text.strip():
        raise ServiceError(f"'{model}' gave an empty answer.", hint=_LOG)
    return text


def answer(url: str, key: str, body: Any, timeout_s: float) -> Any:
    """Return the answer to a chat request that is no stream.

    Raises:
        ServiceError: There is none.
    """
    return _ask("POST", f"{url}{_CHAT}", key, body, timeout_s)


def stream(  # noqa: PLR0917 - what a request has
    url: str,
    key: str,
    body: Any,
    timeout_s: float,
    on_comment: Callable[[str], None] = _ignore,
    headers: Mapping[str, str] | None = None,
) -> Generator[Any, None, None]:
    """Yield the events of a chat request's stream, which is held until the pool is awake, however long that takes.

    Args:
        url: Of the gateway.
        key: Of it; empty: it needs none.
        body: Of the request, less `stream`.
        timeout_s: How long the gateway may be silent.
        on_comment: Gets what the gateway says beside the events: what the request waits for.
        headers: Sent besides.

    Raises:
        ServiceError: There is none, or it ends with an error.
    """
    address = f"{url}{_CHAT}"
    with _asked("POST", address, key, {**body, "stream": True}, timeout_s, headers) as response:
        for line in response.iter_lines():
            if line.startswith(": "):
                on_comment(line[2:])
            elif line.startswith("data: ") and line != "data: [DONE]":
                event = json.loads(line[6:])
                if "error" in event:
                    raise _refused(address, 200, event["error"].get("message", ""))
                yield event


def count_tokens(url: str, key: str, model: str, text: str) -> int | None:
    """Return how many tokens a text has; None where the service has no `/tokenize`."""
    with suppress(ServiceError, KeyError, TypeError, ValueError):
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        return int(_ask("POST", f"{url}/tokenize", key, body, _LIST_TIMEOUT_S)["count"])
    return None


def text_of(message: Any) -> str:
    """Return what a message or a delta says, thoughts included."""
    return str(message.get("reasoning") or message.get("content") or "")


def _ask(method: str, url: str, key: str, body: Any, timeout_s: float) -> Any:
    with _asked(method, url, key, body, timeout_s) as response:
        return json.loads(response.read())


@contextmanager
def _asked(  # noqa: PLR0917 - what a request has
    method: str, url: str, key: str, body: Any, timeout_s: float, headers: Mapping[str, str] | None = None
) -> Iterator[httpx2.Response]:
    """Send a request and yield its answer, unread; reading it raises the errors of this module too."""
    if not (key.isascii() and key.isprintable()):  # the client would say so with the key in it
        raise ServiceError(
            "The key of the gateway has characters that no header can have.", hint="Set VLLM_API_KEY to the key alone."
        )
    sent = {**(headers or {}), **({"Authorization": f"Bearer {key}"} if key else {})}
    try:
        with (
            httpx2.Client(timeout=timeout_s, follow_redirects=True) as http,
            http.stream(method, url, json=body, headers=sent) as response,
        ):
            if response.status_code != 200:
                raise _refused(url, response.status_code, response.read().decode(errors="replace"))
            yield response
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
        raise _no_gateway(url, one_line(error)) from error


def _no_gateway(url: str, why: str) -> ServiceError:
    here = is_loopback(urlsplit(url).hostname or "")
    hint = "Start the service of this machine: vllm-service up. Or name another gateway: --url URL." if here else _LOG
    return ServiceError(f"{url} did not answer as a gateway does: {why.rstrip('.')}.", hint=hint)


def _refused(url: str, status: int, reason: str) -> ServiceError:
    hint = _LOG
    if status == 401:
        hint = "VLLM_API_KEY has none of the keys in the gateway's secret: set it to one that is, or leave it unset."
    return ServiceError(f"{url} answered {status}: {_message(reason)[:300].rstrip('.')}.", hint=hint)


def _message(answer: str) -> str:
    """Return the message of an error in OpenAI's shape; the answer itself where it has none."""
    with suppress(ValueError, KeyError, TypeError):
        answer = str(json.loads(answer)["error"]["message"])
    return " ".join(answer.split())
