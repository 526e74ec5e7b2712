"""Random inputs, each made by a seed and its number: members of the corpus and bodies of the schemas, mutated."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from . import members
from .barrage import Input
from .payloads import EXTREMES, Payloads, paths
from .targets import KEY, request

_COSTLY = 0.02  # of the costly members that are drawn are sent
_CHEAP = {"max_tokens": 1, "max_output_tokens": 1, "n": 1, "best_of": 1}  # else most of the time is spent on answers
_MOST_TOKENS = 16
_HEADS = (
    {"Content-Type": "application/json; charset=utf-8"},
    {"Content-Type": "application/json; charset=utf-16"},
    {"Content-Type": "text/plain"},
    {"Accept": "text/event-stream"},
    {"Accept": "*/*;q=nonsense"},
    {"X-Request-Id": "\xff" * 50},
    {"X-Request-Id": "x" * 5000},
    {"traceparent": "00-0-0-0"},
    {"X-Fallback": "maybe"},
    {"X-data-parallel-rank": "99"},
    {"Content-Encoding": "identity"},
    {"Content-Encoding": "gzip"},
    {"Expect": "100-continue"},
)

Spot = tuple[Any, Any]  # a container, and a key or index in it


class Mutations:
    """Makes inputs.

    Args:
        document: The engine's OpenAPI document.
        model: The model that most of them name.
        seed: Of all of them.
    """

    def __init__(self, document: Mapping[str, Any], model: str, seed: int) -> None:
        self._model, self._seed = model, seed
        self._payloads = [Payloads(document, path, model) for path in paths(document)]
        served = {payloads.path for payloads in self._payloads}
        self._corpus = [member for member in members.load() if member.path in served]

    def inputs(self, numbers: Iterable[int]) -> Iterator[Input]:
        """Yield the inputs of these numbers."""
        return map(self.input, numbers)

    def input(self, number: int) -> Input:
        """Return the input of a number; it is always the same."""
        rng = random.Random(f"{self._seed} {number}")  # noqa: S311 - no secret
        path, body = self._begin(rng)
        if isinstance(body, dict):
            for _ in range(rng.choice((0, 0, 1, 1, 1, 2, 4))):
                self._mutate(body, rng)
            if rng.random() < 0.9:
                self._make_cheap(body)
            body = json.dumps(body).encode()
        if rng.random() < 0.1:
            body = mutated_bytes(body, rng)
        return Input(f"{self._seed}/{number}", path, _framed(path, body, rng))

    def _begin(self, rng: random.Random) -> tuple[str, dict[str, Any] | bytes]:
        if self._corpus and rng.random() < 0.3:
            member = rng.choice(self._corpus)
            if not member.costly or rng.random() < _COSTLY:
                if member.text:
                    return member.path, member.text
                body = members.expanded(member.body, rng.choice((1, 1, 5, 100, 2000)))
                return member.path, _copy({"model": self._model, **body})
        payloads = rng.choice(self._payloads)
        body = payloads.draw(rng) if rng.random() < 0.8 else dict(payloads.base)
        return payloads.path, _copy(body)

    def _mutate(self, body: dict[str, Any], rng: random.Random) -> None:
        spots = list(_spots(body))
        if not spots:
            return
        container, key = rng.choice(spots)
        match rng.randrange(8):
            case 0 | 1 | 2:
                container[key] = _copy(rng.choice(EXTREMES))
            case 3:
                del container[key]
            case 4:
                container[key] = [container[key]] * rng.choice((1, 2, 10))
            case 5:
                container[key] = {rng.choice(("type", "a", "$ref", "")): container[key]}
            case 6:
                other, its_key = rng.choice(spots)
                container[key] = _copy(other[its_key])
            case 7:
                payloads = rng.choice(self._payloads)
                name = rng.choice([*payloads.fields])
                body[name] = _copy(payloads.value(payloads.fields[name], rng))

    def _make_cheap(self, body: dict[str, Any]) -> None:
        body["model"] = self._model
        for name, value in _CHEAP.items():
            if name in body and isinstance(body[name], int) and not isinstance(body[name], bool):
                body[name] = min(body[name], _MOST_TOKENS)
            elif name.startswith("max") and body.get(name) is None:
                body[name] = value


def _copy(value: Any) -> Any:
    """Return a value that shares nothing with the tables, so that mutating it does not change them."""
    return json.loads(json.dumps(value))


def _spots(value: Any) -> Iterator[Spot]:
    """Yield every place in a tree, up to some: lists of thousands are one extreme."""
    todo, seen = [value], 0
    while todo and seen < 200:
        container = todo.pop()
        keys = list(container) if isinstance(container, dict) else range(min(len(container), 5))
        for key in keys:
            seen += 1
            yield container, key
            if isinstance(container[key], dict | list):
                todo.append(container[key])


def mutated_bytes(body: bytes, rng: random.Random) -> bytes:
    """Return bytes with a few of them changed."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(body) + 1)
        body = rng.choice(_BYTES)(body, at, rng)
    return body


_BITS = (
    b"\0",
    b"\xff",
    b"\xed\xa0\x80",
    b"\\ud800",
    b"\\u0000",
    b'"',
    b"{",
    b"}",
    b"[",
    b",",
    b"1e999",
    b"NaN",
    b"\xef\xbb\xbf",
)
_BYTES: tuple[Callable[[bytes, int, random.Random], bytes], ...] = (
    lambda body, at, rng: body[:at] + rng.choice(_BITS) + body[at:],
    lambda body, at, rng: body[:at] + rng.choice(_BITS) + body[at + 1 :],
    lambda body, at, rng: body[:at] + body[at + rng.choice((1, 2, 10)) :],
    lambda body, at, rng: body[:at] + bytes([rng.randrange(256)]) + body[at + 1 :],
    lambda body, at, _: body[:at],
    lambda body, at, rng: body[:at] + body[at : at + 20] * rng.choice((2, 10, 200)) + body[at + 20 :],
)


def _framed(path: str, body: bytes, rng: random.Random) -> bytes:
    """Return a whole request, at times with other headers or in chunks."""
    headers = {"Authorization": f"Bearer {KEY}"}
    if rng.random() < 0.1:
        headers |= rng.choice(_HEADS)
    if rng.random() < 0.05:
        headers["Content-Encoding"] = "gzip"
        packer = zlib.compressobj(wbits=31)
        body = packer.compress(body) + packer.flush()
    if rng.random() < 0.1:
        return _chunked(path, headers, body, rng)
    return request("POST", path, headers, body)


def _chunked(path: str, headers: Mapping[str, str], body: bytes, rng: random.Random) -> bytes:
    head = request("POST", path, {**headers, "Transfer-Encoding": "chunked"}).replace(b"Content-Length: 0\r\n", b"")
    size = rng.choice((1, 7, 1000, 100_000))
    if len(body) / size > 1000:
        size = 1000
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return head + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
