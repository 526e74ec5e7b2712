"""The gRPC server: the handler of each call, and a transcript of all calls with their callers.

Owns registration, dispatch and the transcript. A call without a handler is answered UNIMPLEMENTED with its name. Every
call of an unsupported client version is an error, in whatever environment the client runs. An unexpected exception of a
handler is answered FAILED_PRECONDITION, which no client retries, so that an error of the plane shows at once and not
after a minute of back-off.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import grpclib.const
import grpclib.exceptions
import grpclib.protocol
import grpclib.server
from google.protobuf.message import Message
from grpclib import GRPCError, Status
from h2.settings import SettingCodes
from modal._utils.grpc_utils import custom_detail_codec
from modal_proto import api_grpc

from .client_version import why_refused

if TYPE_CHECKING:
    from .sandbox import Task

STREAMS_PER_CONNECTION = 10_000  # h2's 100 end a container's concurrency there: each input has a stream for its body
VERSION_HEADER = "x-modal-client-version"
F = TypeVar("F", bound=Callable[..., Any])
UnaryHandler = Callable[[Any, "Task | None"], Awaitable[Message]]
StreamHandler = Callable[[Any, "Task | None"], AsyncIterator[Message]]


@dataclass(frozen=True)
class Call:
    """One call as it arrived. `caller` is "client" or the id of the calling task."""

    name: str
    caller: str
    request: Message
    at: float


@dataclass
class Transcript:
    """Every call in order of arrival, the names without a handler, and the plane's own failures.

    `refused` has the errors that a test wants calls answered with, by their names.
    """

    calls: list[Call] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    refused: dict[str, GRPCError] = field(default_factory=dict)

    def note(self, name: str, task: Task | None, request: Message) -> None:
        self.calls.append(Call(name, task.id if task else "client", request, time.time()))


def unary(name: str) -> Callable[[F], F]:
    """Answer the call `name` with the decorated `async def (request, task) -> response`."""
    return _mark(name, streams=False)


def streaming(name: str) -> Callable[[F], F]:
    """Answer the call `name` with the decorated async generator `(request, task) -> responses`."""
    return _mark(name, streams=True)


def _mark(name: str, *, streams: bool) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        function.rpc = (name, streams)  # type: ignore[attr-defined]
        return function

    return decorate


class Handlers:
    """The handlers of all parts by call name. Two handlers for one call are an error."""

    def __init__(self, roles: Iterable[object]) -> None:
        self.unary: dict[str, UnaryHandler] = {}
        self.streaming: dict[str, StreamHandler] = {}
        for role in roles:
            for attribute in dir(type(role)):
                if mark := getattr(getattr(type(role), attribute), "rpc", None):
                    self._add(mark[0], getattr(role, attribute), streams=mark[1])

    def _add(self, name: str, handler: Any, *, streams: bool) -> None:
        if name not in api_grpc.ModalClientBase.__abstractmethods__:
            raise TypeError(f"{handler!r} answers {name!r}, which is no call of the installed modal client.")
        if name in self.unary or name in self.streaming:
            raise TypeError(f"{handler!r} answers {name!r}, which another role answers already.")
        if streams:
            self.streaming[name] = handler
        else:
            self.unary[name] = handler


def _template() -> dict[str, grpclib.const.Handler]:
    async def unreachable(self: object, stream: object) -> None:
        raise NotImplementedError

    names = api_grpc.ModalClientBase.__abstractmethods__
    blank = type("Blank", (api_grpc.ModalClientBase,), dict.fromkeys(names, unreachable))
    mapping: dict[str, grpclib.const.Handler] = blank().__mapping__()
    return mapping


TEMPLATE = _template()


class _Protocol(grpclib.protocol.H2Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.connection._connection.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: STREAMS_PER_CONNECTION})
        self.connection.flush()


class _Server(grpclib.server.Server):
    def _protocol_factory(self) -> grpclib.protocol.H2Protocol:
        made = super()._protocol_factory()
        return _Protocol(made.handler, made.config, made.h2_config)


class Endpoint:
    """One address of the plane: the client's, or one container's, since calls of containers have no task id."""

    def __init__(self, handlers: Handlers, transcript: Transcript, task: Task | None = None) -> None:
        self._handlers, self._transcript, self._task = handlers, transcript, task

    def server(self) -> grpclib.server.Server:
        return _Server([self], status_details_codec=custom_detail_codec)

    def __mapping__(self) -> dict[str, grpclib.const.Handler]:
        return {
            path: grpclib.const.Handler(self._dispatcher(path.rsplit("/", 1)[1]), *types)
            for path, (_, *types) in TEMPLATE.items()
        }

    def _dispatcher(self, name: str) -> Callable[[Any], Awaitable[None]]:
        async def dispatch(stream: Any) -> None:
            request = await stream.recv_message()
            self._transcript.note(name, self._task, request)
            try:
                _check_client(stream)
                await self._answer(name, request, stream)
            except (GRPCError, OSError, grpclib.exceptions.StreamTerminatedError):
                raise
            except Exception as error:
                self._transcript.failures.append(f"{name}: {error!r}")
                message = f"The plane failed in {name}: {error!r}"
                raise GRPCError(Status.FAILED_PRECONDITION, message) from error

        return dispatch

    async def _answer(self, name: str, request: Message, stream: Any) -> None:
        if refused := self._transcript.refused.get(name):
            raise refused
        if handler := self._handlers.unary.get(name):
            await stream.send_message(await handler(request, self._task))
        elif streamer := self._handlers.streaming.get(name):
            async for message in streamer(request, self._task):
                await stream.send_message(message)
        else:
            self._transcript.unknown.append(name)
            raise GRPCError(Status.UNIMPLEMENTED, f"The modal plane for tests does not know the call {name!r}.")


def _check_client(stream: Any) -> None:
    if refused := why_refused(stream.metadata.get(VERSION_HEADER, "")):
        raise GRPCError(Status.FAILED_PRECONDITION, refused)
