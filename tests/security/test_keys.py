"""Every route by every method with a key in every place: who has no key gets nothing, and starts nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import product

from vllm_service import http_contract

from tests.engine.routes import DISGUISES, KNOWN

from . import key_places
from .key_places import Attempt
from .targets import COLD, KEY, OTHER_KEY, Answer, Connection, Target, request

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")
OPEN = {"gateway": {"/", "/health", "/docs", "/openapi.json"}, "guard": {"/health"}}
CLOSED = {401, 404, 405}  # what a request without a key may be answered


def paths(target: Target) -> list[str]:
    """Return every path that the service or its engine says it has, and those that vLLM had in other versions."""
    found = dict.fromkeys([*target.routes, *http_contract.ROUTES, *KNOWN, *DISGUISES])
    return [re.sub(r"{\w+}", "tiny", path) for path in found]


def is_listed(target: Target, path: str) -> bool:
    """Tell whether the target has routes at this path."""
    routes = http_contract.routes_at(http_contract.canonical_path(path))
    return any(target.name == "gateway" or not route.gateway_only for route in routes.values())


def admits(target: Target, method: str, path: str, answer: Answer) -> bool:
    """Tell whether an answer is more than one without a key may get."""
    is_open = http_contract.canonical_path(path) in OPEN[target.name]
    if method == "OPTIONS" and answer.status == 204:
        return bool(answer.body)
    return answer.status not in CLOSED and not (is_open and method in {"GET", "HEAD"})


def attempts_on(target: Target) -> Iterator[tuple[str, str, str, Attempt]]:
    """Yield path, method, name and attempt: all attempts on the routes of the target, two on every other path."""
    attempts = key_places.refused(KEY)
    few = {name: attempts[name] for name in ("none", "wrong Bearer")}
    for path in paths(target):
        for method, (name, attempt) in product(METHODS, (attempts if is_listed(target, path) else few).items()):
            yield path, method, name, attempt


def test_keys_are_looked_for_in_their_headers_only(attacked: Target) -> None:
    """No key, wrong ones, and a right one in every other place: nobody gets in, and no model starts."""
    let_in, asked = [], 0
    with attacked.unharmed(), attacked.connection() as connection:
        lasting = attacked.lasting()
        for path, method, name, attempt in attempts_on(attacked):
            answer = connection.ask(attempt.request(method, path, COLD), has_body=method != "HEAD")
            asked += 1
            if admits(attacked, method, path, answer):
                let_in.append(f"{method} {path} {name}: {answer.status} {answer.body[:100]!r}")
        assert let_in == []
        assert attacked.lasting() == lasting
    assert len(paths(attacked)) > 60
    assert asked > 10_000
    if attacked.name == "gateway":
        models = json.loads(attacked.ask("GET", "/v1/models").body)["data"]
        assert {model["state"] for model in models if model["id"] == COLD} == {"cold"}


def test_keys_in_their_headers_admit(attacked: Target) -> None:
    """The attempts above fail for want of a key and nothing else: each right way is let in."""
    with attacked.connection() as connection:
        for name, attempt in key_places.admitting(KEY).items():
            answer = connection.ask(attempt.request("GET", "/v1/models", COLD))
            assert answer.status == 200, f"{name}: {answer}"


def test_keys_in_one_header_twice_need_a_right_one(attacked: Target) -> None:
    """Which of the two counts does not matter, as long as two wrong ones do not admit."""
    with attacked.connection() as connection:
        for header in ("Authorization", "x-api-key", "api-key"):
            prefix = "Bearer " if header == "Authorization" else ""
            assert ask_twice(connection, header, f"{prefix}{KEY}", f"{prefix}{KEY}") == 200
            assert ask_twice(connection, header, f"{prefix}wrong", f"{prefix}none") == 401
            assert ask_twice(connection, header, f"{prefix}wrong", f"{prefix}{KEY}") in {200, 401}


def test_key_that_is_no_admin_gets_none_of_the_operators_routes(attacked: Target) -> None:
    """By no method, with a body that each would take: nothing is made, and no model starts."""
    admin = {path for path, routes in http_contract.ROUTES.items() for route in routes.values() if route.admin}
    lasting, let_in = attacked.lasting(), []
    with attacked.connection() as connection:
        for path, method in product(sorted(admin), METHODS):
            for where in (path, f"{path}/", f"{path}?model={COLD}"):
                asked = request(
                    method, where, {"Authorization": f"Bearer {OTHER_KEY}"}, b'{"name": "eve", "admin": true}'
                )
                answer = connection.ask(asked, has_body=method != "HEAD")
                if answer.status not in {403, 404, 405} and not (method == "OPTIONS" and answer.status == 204):
                    let_in.append(f"{method} {where}: {answer.status} {answer.body[:100]!r}")
    assert len(admin) >= 6
    if attacked.name == "gateway":
        assert let_in == []
        listed = json.loads(attacked.ask("GET", "/admin/keys").body)["keys"]
        assert {key["name"] for key in listed} == {"attacked", "bystander"}
    assert attacked.lasting() == lasting


def ask_twice(connection: Connection, header: str, first: str, second: str) -> int:
    """Return the status of a request with a header twice."""
    attempt = Attempt(((header, first), (header, second)))
    return connection.ask(attempt.request("GET", "/v1/models", COLD)).status
