"""The pool of a deployed model as a batch uses it: lines are the inputs of one `.map`, which Modal spreads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import modal

from service import pools
from service.batch.lines import Line
from service.batch.worker import Answer, Send
from service.errors import ServiceError, UnknownModelError
from service.modal_app import deployed, gateway_access, gateway_check
from service.modal_app.account import translate_errors
from service.usage.records import OPERATOR

_Input = tuple[int, str, bytes, str]


@dataclass(frozen=True)
class BatchPool:
    """A pool of a deployed tier.

    Attributes:
        model: Key of its model.
        app: Name of the app.
        client: In whose name its requests are recorded.
    """

    model: str
    app: str
    client: str
    _method: Any
    _names: deployed.Names

    def is_named(self, name: str) -> bool:
        """Tell whether a name is one of its model's."""
        try:
            return self._names.registry.resolve(name, self._names.settings.model).spec.key == self.model
        except UnknownModelError:
            return False

    @asynccontextmanager
    async def mapped(self) -> AsyncIterator[Send]:
        """Give what sends a line: as an input of one `.map`, which lasts as long as the block."""
        lines = MappedLines(self._method, self.client, self.app)
        reading = asyncio.ensure_future(lines.read())
        try:
            yield lines.send
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


class MappedLines:
    """Matches the outputs of a `.map`, which come in any order, with the lines that were sent.

    Args:
        method: Modal's.
        client: In whose name requests are recorded.
        app: Name of the deployed app.
    """

    def __init__(self, method: Any, client: str, app: str) -> None:
        self._method, self._client, self._app = method, client, app
        self._inputs: asyncio.Queue[_Input] = asyncio.Queue()
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._outstanding = 0
        self._failure: BaseException | None = None

    async def send(self, line: Line) -> Answer:
        """Return the answer to a line.

        Raises:
            ConnectionError: Its call failed.
            ServiceError: Modal takes no calls.
        """
        if self._failure:
            raise self._failure
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[line.number] = future
        self._outstanding += 1
        self._inputs.put_nowait((line.number, line.url, line.body, self._client))
        try:
            return await future
        finally:
            self._waiting.pop(line.number, None)

    async def read(self) -> None:
        """Take outputs until it is cancelled."""
        try:
            with translate_errors("answer the batch"):
                async for output in self._method.starmap.aio(self._fed(), order_outputs=False, return_exceptions=True):
                    self._take(output)
        except Exception as error:  # noqa: BLE001 - each line that waits raises it
            if isinstance(error.__cause__, modal.exception.NotFoundError):
                error = ServiceError(
                    f"App '{self._app}' has no method for batches: an earlier version deployed it.",
                    hint="Deploy it again: vllm-service deploy.",
                )
            self._failure = error
            self._fail(error)

    async def _fed(self) -> AsyncIterator[_Input]:
        while True:
            yield await self._inputs.get()

    def _take(self, output: Any) -> None:
        self._outstanding -= 1
        if not isinstance(output, BaseException):
            number, fields = output
            if (future := self._waiting.get(number)) and not future.done():
                future.set_result(Answer(**fields))
        if not self._outstanding:  # a call that failed does not tell of which line: of those that wait still
            why = str(output) if isinstance(output, BaseException) else "another call of it failed"
            self._fail(ConnectionError(f"Modal's call failed: {why}"))

    def _fail(self, error: Exception) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error)


def find(settings: Any, model: str, gpu: str | None) -> BatchPool:
    """Return the pool of a model: the one that the gateway uses too, or a variant on another GPU.

    Args:
        settings: The service's.
        model: Any of its names.
        gpu: None: the model's own. Where no tier of it is deployed, the class of the model's own tier runs on it.

    Raises:
        UsageError: There is no such model or GPU, or they do not go together.
        ServiceError: It is not deployed, or Modal does not answer.
    """
    names = deployed.Names(settings)
    target = names.target(model, gpu)
    target.check_fit()
    try:
        app = deployed.find(names, target)
    except ServiceError:
        if not gpu:
            raise
        app = deployed.find(names, names.target(model))
    key, tier, name = target.model.key if target.model else model, target.tier, app.app.name
    if app.tier == tier:
        server = modal.Cls.from_name(name, "Server")(model=key)
    else:
        server = pools.variant(key, tier.gpu.name, tier.n_gpu, app=name)
    return BatchPool(key, name, _client(names), server.complete_line, names)


def _client(names: deployed.Names) -> str:
    """Return the name of the key in VLLM_API_KEY, as the gateway knows it; the operator's where none is set."""
    if not (key := gateway_access.api_key()):
        return OPERATOR
    url = (deployed.find(names, None).url or "").rstrip("/")
    return gateway_check.key_name(url, key)
