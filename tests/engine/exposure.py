"""What the guard must answer on every path, by every method, with every credential; asked over any transport."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import unquote

from vllm_service import api_error, engine_errors, http_contract
from vllm_service.http_contract import BODY_LIMIT, MIB, Protocol, protocol_of

from .routes import ALLOWED, DISGUISES, KNOWN, error_of

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
_ROUTES = [route for routes in http_contract.ROUTES.values() for route in routes.values()]
WITHOUT_KEY = {"/health"}  # the pages that the gateway answers itself are vLLM's own here
BODY_LIMITS = {route.path: route.body_limit for route in _ROUTES}
GuardError = Literal["no route", "no method", "no key", "too large", "options"]
GUARD_ERRORS: tuple[GuardError, ...] = ("no route", "no method", "no key", "too large", "options")
# FastAPI's answers to a path that is not registered, and to a method that is not
_VLLMS_ERRORS = ((404, b'{"detail":"Not Found"}'), (405, b'{"detail":"Method Not Allowed"}'))


@dataclass(frozen=True)
class Case:
    """One request without a body, and the guard's own answer that must come; None: vLLM must answer."""

    method: str
    path: str
    headers: Mapping[str, str]
    expected: GuardError | None


@dataclass(frozen=True)
class Answer:
    """An HTTP response; names of headers are in lower case. Status 0: none came in time."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


def cases(routes: Iterable[str], key: str | None) -> Iterator[Case]:
    """Return the requests to make of an engine: all paths by all methods, with and without a key, and over the limits.

    Args:
        routes: Paths that the engine's application has registered; those that the tests know of are added.
        key: One that the guard accepts; None: the engine was started without keys.
    """
    none: dict[str, str] = {}
    wrong, right = {"Authorization": "Bearer wrong"}, {"Authorization": f"Bearer {key}"}
    for pattern in dict.fromkeys([*routes, *ALLOWED, *KNOWN, *DISGUISES, "/", "/v1/models/tiny", "/metrics/"]):
        path = re.sub(r"{\w+}", "resp_1", pattern)
        allowed = _allowed(path)
        needs_key = key is not None and path not in WITHOUT_KEY
        for method in METHODS:
            for headers in (none, wrong, right) if allowed else (none, right):
                yield Case(method, path, headers, _expected(allowed, method, needs_key and headers is not right))
        length = str(BODY_LIMITS.get(path.removesuffix("/"), BODY_LIMIT) + 1)
        for method in sorted(allowed):
            yield Case(method, path, {**right, "Content-Length": length}, "too large")


def _allowed(path: str) -> set[str]:
    """Return the methods of a path; `/v1/responses/render`, say, is to GET the response of that id."""
    path = path.removesuffix("/")  # vLLM's own /metrics/ is /metrics
    patterns = {re.sub(r"{\w+}", r"[\\w-]+", pattern): methods for pattern, methods in ALLOWED.items()}
    return next((methods for pattern, methods in patterns.items() if re.fullmatch(pattern, path)), set())


def _expected(allowed: set[str], method: str, lacks_key: bool) -> GuardError | None:
    if not allowed:
        return "no route"
    if method == "OPTIONS":  # needs no key, as a browser asks before it sends its key
        return "options"
    if method not in allowed and not (method == "HEAD" and "GET" in allowed):
        return "no method"
    return "no key" if lacks_key else None


def violations(ask: Callable[[Case], Answer], asked: Iterable[Case]) -> list[str]:
    """Make the requests and return a line for each that was not answered as expected."""
    found = []
    for case in asked:
        answer = ask(case)
        given = _guard_error(case, answer)
        if given != case.expected or answer.status == 0:
            came = f"{answer.status} {answer.body[:200]!r}"
            found.append(f"{case.method} {case.path} {dict(case.headers)}: expected {case.expected}, got {came}")
    return found


def _guard_error(case: Case, answer: Answer) -> GuardError | None:
    """Return which of the guard's answers this is, down to its words, which none of vLLM's own has."""
    return next((error for error in GUARD_ERRORS if _is(error, case, answer)), None)


def _is(error: GuardError, case: Case, answer: Answer) -> bool:
    if error == "options":
        return answer.status == 204 and set(answer.headers.get("allow", "").split(", ")) == _allowed(case.path)
    no_route = f"No route {unquote(case.path)}. What this service has is listed at /docs."
    limit = "512 KiB" if BODY_LIMITS.get(case.path, BODY_LIMIT) < MIB else "32 MiB"
    status, words = {
        "no route": (404, no_route),
        "no method": (405, f"{case.method} is not allowed on {case.path.removesuffix('/')}; use "),
        "no key": (401, "A valid API key is needed: "),
        "too large": (413, f"The body is over the limit of {limit} "),
    }[error]
    if answer.status != status or answer.headers.get("content-type") != "application/json":
        return False
    if error == "no key" and answer.headers.get("www-authenticate") != "Bearer":
        return False
    if case.method == "HEAD":  # its answer has no body, but says how long it would be
        return answer.headers.get("content-length") not in _lengths_of_vllms_errors(case.path, status)
    return _is_api_error(case.path, status, answer.body, words)


def _lengths_of_vllms_errors(path: str, status: int) -> set[str]:
    """Return the lengths of FastAPI's answers of a status, as they are and as the guard reshapes them."""
    reshaped = [engine_errors.from_answer(path, *error) for error in _VLLMS_ERRORS]
    bodies = [*_VLLMS_ERRORS, *((error.status, error.body(path, "0" * 32)) for error in reshaped)]
    return {str(len(body)) for its_status, body in bodies if its_status == status}


def _is_api_error(path: str, status: int, body: bytes, words: str) -> bool:
    """Tell whether a body is an error in the shape of its path, of this status, with a message that begins so."""
    try:
        error = error_of(body, path)
    except (AssertionError, ValueError, KeyError, TypeError):
        return False
    names = api_error.error_names(status)
    kind = names.anthropic if protocol_of(path) is Protocol.ANTHROPIC else names.openai
    return bool(error["type"] == kind and error["message"].startswith(words))
