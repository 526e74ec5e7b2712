"""An engine as a replica on Modal has it: behind its guard alone, with no gateway in front."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import requests

from service.engine.environment import EngineEnv
from service.engine.log import EngineLog
from service.keys import digest
from service.registry.models import Registry
from service.replica.lifecycle import Replica
from service.replica.plan import Plan

from .exposure import Answer, Case
from .routes import registered_routes
from .running import free_port

KEYS = ("sk-alice-4f1c9a", "sk-bob-77e0d2", "sk-default-0b5e31")
POOLING = ("--runner", "pooling")  # makes an embedding model of the tiny one
_ANSWER_S = 10  # the guard and vLLM answer within milliseconds; one that waits for a body never does


@dataclass(frozen=True)
class Guarded:
    """A ready engine behind its guard.

    Attributes:
        key: One of the keys that the guard accepts; None: it asks for none.
        routes: Path -> methods of every route of vLLM's application.
        pid: Process id of the engine, which leads its session.
        log: The engine's output, which goes on.
    """

    port: int
    key: str | None
    routes: dict[str, set[str]]
    pid: int
    log: EngineLog

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        """The header that carries the key, if there is one."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def requests_seen(self) -> float:
        """Return how many requests vLLM's application has had, those to no route too.

        It does not count its pages for monitors: /metrics, /health, /load, /ping, /version.
        """
        text = requests.get(f"{self.url}/metrics", headers=self.headers, timeout=30).text
        return sum(float(count) for count in re.findall(r"^http_requests_total{.*} (\S+)$", text, re.MULTILINE))

    @contextmanager
    def asking(self) -> Iterator[Asker]:
        """Give a function that makes requests, over one connection for as long as it holds."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=_ANSWER_S)) as connection:
            yield Asker(connection)


class Asker:
    """Makes requests exactly as they are written."""

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self._connection = connection

    def __call__(self, case: Case) -> Answer:
        """Make one request; of a body that it declares it sends nothing."""
        try:
            self._connection.request(case.method, case.path, headers=dict(case.headers))
            answer = self._connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        except TimeoutError:
            return Answer(0)
        finally:
            if "Content-Length" in case.headers:  # the server still waits for that body
                self._connection.close()


@contextmanager
def guarded(env: EngineEnv, keys: tuple[str, ...] = (), extra_args: tuple[str, ...] = ()) -> Iterator[Guarded]:
    """Boot the tiny model's replica and stop it in the end.

    Args:
        env: The engine's environment.
        keys: Keys to accept; empty: no key is asked for.
        extra_args: Of the registry entry.
    """
    spec = Registry.load().specs["tiny"].model_copy(update={"extra_args": extra_args})
    plan = Plan(spec, spec.key, env.device, env.python, os.environ, port=free_port())
    replica = Replica(plan)
    try:
        replica.prepare()
        replica.start({digest(key.encode()): f"user{number}" for number, key in enumerate(keys)})
        engine = Guarded(plan.port, keys[0] if keys else None, {}, replica.engine.pid, replica.engine.log)
        engine.routes.update(registered_routes("\n".join(engine.log.lines), engine.url, engine.headers))
        yield engine
    finally:
        replica.stop(0)
