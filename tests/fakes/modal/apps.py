"""Apps: creation, publication, look-up, logs, stop.

Owns the functions of each name. What a deploy creates becomes visible with `AppPublish`, so a deploy that fails earlier
publishes nothing and leaves the previous version unchanged.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from modal_proto import api_pb2 as pb

from .ids import Ids
from .rpc import streaming, unary

if TYPE_CHECKING:
    from .functions import Functions
    from .sandbox import Task


@dataclass(frozen=True)
class Line:
    """Output of a container; `function_ids` are its pool's and, of a class with parameters, that of the class."""

    task_id: str
    function_ids: tuple[str, str | None]
    text: str
    at: float = field(default_factory=time.time)

    def matches(self, request: pb.AppGetLogsRequest | pb.AppFetchLogsRequest) -> bool:
        """Tell whether a request asks for it; an empty filter excludes nothing."""
        return (
            request.task_id in {"", self.task_id}
            and request.function_id in {"", *self.function_ids}
            and request.parametrized_function_id in {"", self.function_ids[0]}
        )

    def to_item(self) -> pb.TaskLogs:
        return pb.TaskLogs(data=self.text, timestamp=self.at, file_descriptor=pb.FILE_DESCRIPTOR_STDOUT)


class Log:
    """Lines of an app's containers; every reader follows from the start."""

    def __init__(self) -> None:
        self._lines: list[Line] = []
        self._changed = asyncio.Event()
        self._closed = False

    def add(self, line: Line) -> None:
        self._lines.append(line)
        self._wake()

    def close(self) -> None:
        self._closed = True
        self._wake()

    def between(self, since: float, until: float) -> list[Line]:
        """Return the lines of a span."""
        return [line for line in self._lines if since <= line.at <= until]

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def follow(self, start: int = 0) -> AsyncIterator[tuple[int, Line]]:
        position = start
        while True:
            while position < len(self._lines):
                position += 1
                yield position, self._lines[position - 1]
            if self._closed:
                return
            await self._changed.wait()


@dataclass(frozen=True)
class Version:
    """One publication of an app: what it published, and the version that it went back to (0: none)."""

    tag: str
    function_ids: dict[str, str]
    class_ids: dict[str, str]
    functions: dict[str, pb.Function] = field(repr=False)
    deployed_at: float
    rollback_version: int = 0


@dataclass(eq=False)
class App:
    """One app. `functions` and `classes` map what the client published to ids; `versions` counts publications."""

    id: str
    name: str
    state: int = pb.APP_STATE_INITIALIZING
    function_ids: dict[str, str] = field(default_factory=dict)
    class_ids: dict[str, str] = field(default_factory=dict)
    versions: int = 0
    tags: dict[str, str] = field(default_factory=dict)
    functions: dict[str, pb.Function] = field(default_factory=dict)
    log: Log = field(default_factory=Log, repr=False)
    created_at: float = field(default_factory=time.time)
    history: list[Version] = field(default_factory=list, repr=False)

    @property
    def app_id(self) -> str:
        return self.id

    @property
    def classes(self) -> list[str]:
        return list(self.class_ids)

    @property
    def is_deployed(self) -> bool:
        return self.state == pb.APP_STATE_DEPLOYED


class Apps:
    """Apps by id and, once deployed, by name."""

    def __init__(self, ids: Ids, functions: Functions) -> None:
        self._ids, self._functions = ids, functions
        self._by_id: dict[str, App] = {}
        self._deployed: dict[str, App] = {}
        self.stop_containers: Callable[[App], Awaitable[None]]
        self.running: Callable[[App], int]
        self.published: Callable[[App], Awaitable[None]]

    def by_id(self, app_id: str) -> App:
        if app := self._by_id.get(app_id):
            return app
        raise GRPCError(Status.NOT_FOUND, f"App {app_id} not found")

    def deployed(self, name: str) -> App | None:
        return self._deployed.get(name)

    def all(self) -> list[App]:
        return list(self._by_id.values())

    def layout(self, app: App) -> pb.AppLayout:
        """Return for a client or a container what the app consists of, with the dependencies of its functions."""
        layout = pb.AppLayout(function_ids=app.function_ids, class_ids=app.class_ids)
        dependencies: set[str] = set()
        for function_id in app.function_ids.values():
            metadata = self._functions.metadata(function_id)
            layout.objects.add(object_id=function_id, function_handle_metadata=metadata)
            definition = self._functions.by_id(function_id).definition
            dependencies |= {dependency.object_id for dependency in definition.object_dependencies}
        for class_id in app.class_ids.values():
            layout.objects.add(object_id=class_id, class_handle_metadata=pb.ClassHandleMetadata())
        for object_id in sorted(dependencies):
            if object_id.startswith("vo-"):
                metadata_of_volume = self._functions.volumes.metadata(object_id)
                layout.objects.add(object_id=object_id, volume_metadata=metadata_of_volume)
            else:
                layout.objects.add(object_id=object_id)
        return layout

    def _new(self, name: str) -> App:
        app = App(self._ids.new("ap"), name)
        self._by_id[app.id] = app
        return app

    @unary("AppCreate")
    async def create(self, request: pb.AppCreateRequest, task: Task | None) -> pb.AppCreateResponse:
        app = self._new(request.description)
        return pb.AppCreateResponse(app_id=app.id, app_page_url=f"http://127.0.0.1/apps/{app.id}")

    @unary("AppGetOrCreate")
    async def get_or_create(self, request: pb.AppGetOrCreateRequest, task: Task | None) -> pb.AppGetOrCreateResponse:
        app = self._deployed.get(request.app_name)
        if app is None and request.object_creation_type == pb.OBJECT_CREATION_TYPE_UNSPECIFIED:
            raise GRPCError(Status.NOT_FOUND, f"App '{request.app_name}' not found in environment 'main'")
        return pb.AppGetOrCreateResponse(app_id=(app or self._new(request.app_name)).id)

    @unary("AppGetByDeploymentName")
    async def get_by_name(
        self, request: pb.AppGetByDeploymentNameRequest, task: Task | None
    ) -> pb.AppGetByDeploymentNameResponse:
        app = self._deployed.get(request.name)
        return pb.AppGetByDeploymentNameResponse(app_id=app.id if app else "", environment_name="main")

    @unary("AppGetLayout")
    async def get_layout(self, request: pb.AppGetLayoutRequest, task: Task | None) -> pb.AppGetLayoutResponse:
        return pb.AppGetLayoutResponse(app_layout=self.layout(self.by_id(request.app_id)))

    @unary("AppHeartbeat")
    async def heartbeat(self, request: pb.AppHeartbeatRequest, task: Task | None) -> Empty:
        self.by_id(request.app_id)
        return Empty()

    @unary("AppPublish")
    async def publish(self, request: pb.AppPublishRequest, task: Task | None) -> pb.AppPublishResponse:
        app = self.by_id(request.app_id)
        removed = set(app.function_ids.values()) - set(request.function_ids.values())
        app.function_ids, app.class_ids = dict(request.function_ids), dict(request.class_ids)
        app.state, app.tags = request.app_state, dict(request.tags)
        app.name = request.name or app.name
        self._functions.forget(removed)
        if app.is_deployed:
            self._deployed[app.name] = app
        await self._activate(app, request.deployment_tag)
        return pb.AppPublishResponse(url=f"http://127.0.0.1/apps/{app.name}", deployed_at=time.time())

    async def _activate(self, app: App, tag: str, rollback_version: int = 0) -> None:
        """Make the staged definitions the app's next version."""
        promoted = {name: self._functions.promote(function_id) for name, function_id in app.function_ids.items()}
        app.functions = {name.removesuffix(".*"): definition for name, definition in promoted.items()}
        app.versions += 1
        ids = dict(app.function_ids), dict(app.class_ids)
        app.history.append(Version(tag, *ids, promoted, time.time(), rollback_version))
        await self.published(app)

    @unary("AppRollback")
    async def rollback(self, request: pb.AppRollbackRequest, task: Task | None) -> pb.AppRollbackResponse:
        app = self.by_id(request.app_id)
        number = request.version if request.version > 0 else app.versions + request.version
        if not app.is_deployed or not 1 <= number <= app.versions:
            text = f"App '{app.name}' is not deployed, or has no version {number}"
            raise GRPCError(Status.FAILED_PRECONDITION, text)
        version = app.history[number - 1]
        app.function_ids, app.class_ids = dict(version.function_ids), dict(version.class_ids)
        for name, function_id in app.function_ids.items():
            self._functions.by_id(function_id).staged = version.functions[name]
        await self._activate(app, "", number)
        return pb.AppRollbackResponse(url=f"http://127.0.0.1/apps/{app.name}", deployed_at=time.time())

    @unary("AppDeploymentHistory")
    async def deployments(
        self, request: pb.AppDeploymentHistoryRequest, task: Task | None
    ) -> pb.AppDeploymentHistoryResponse:
        app = self.by_id(request.app_id)
        entries = [
            pb.AppDeploymentHistory(
                app_id=app.id,
                version=number,
                tag=version.tag,
                rollback_version=version.rollback_version,
                rollback_allowed=True,
                deployed_at=version.deployed_at,
            )
            for number, version in enumerate(app.history, 1)
        ]
        return pb.AppDeploymentHistoryResponse(
            app_deployment_histories=reversed(entries), production_app_version=app.versions
        )

    @unary("AppClientDisconnect")
    async def disconnect(self, request: pb.AppClientDisconnectRequest, task: Task | None) -> Empty:
        app = self.by_id(request.app_id)
        if not app.is_deployed:
            await self._stop(app)
        return Empty()

    @unary("AppStop")
    async def stop(self, request: pb.AppStopRequest, task: Task | None) -> Empty:
        await self._stop(self.by_id(request.app_id))
        return Empty()

    async def _stop(self, app: App) -> None:
        app.state = pb.APP_STATE_STOPPED
        if self._deployed.get(app.name) is app:
            del self._deployed[app.name]
        await self.stop_containers(app)
        app.log.close()

    @streaming("AppGetLogs")
    async def logs(self, request: pb.AppGetLogsRequest, task: Task | None) -> AsyncIterator[pb.TaskLogsBatch]:
        start = int(request.last_entry_id.split("-")[0] or 0)
        async for position, line in self.by_id(request.app_id).log.follow(start):
            if line.matches(request):
                yield pb.TaskLogsBatch(task_id=line.task_id, entry_id=f"{position}-0", items=[line.to_item()])
        yield pb.TaskLogsBatch(app_done=True)

    @unary("AppFetchLogs")
    async def fetch_logs(self, request: pb.AppFetchLogsRequest, task: Task | None) -> pb.AppFetchLogsResponse:
        since, until = request.since.ToMicroseconds() / 1e6, request.until.ToMicroseconds() / 1e6
        lines = self.by_id(request.app_id).log.between(since, until or time.time())
        found = [line for line in lines if line.matches(request)][-(request.limit or 100) :]
        batches = [pb.TaskLogsBatch(task_id=line.task_id, items=[line.to_item()]) for line in found]
        return pb.AppFetchLogsResponse(batches=batches)

    @unary("AppList")
    async def list(self, request: pb.AppListRequest, task: Task | None) -> pb.AppListResponse:
        items = [
            pb.AppListResponse.AppListItem(
                app_id=app.id,
                description=app.name,
                name=app.name,
                state=app.state,  # type: ignore[arg-type]
                created_at=app.created_at,
                n_running_tasks=self.running(app),
            )
            for app in self.all()
        ]
        return pb.AppListResponse(apps=items)
