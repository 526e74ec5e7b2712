"""Starts a container of a function: its directory, mounts, volumes, environment, arguments and socket."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import grpclib.server
from modal_proto import api_pb2 as pb

from .apps import Apps, Line
from .functions import Function
from .gpus import lay_out_gpus
from .ids import Ids
from .objects import ENVIRONMENT, Images, Mounts, Secrets
from .rpc import Endpoint, Handlers, Transcript
from .sandbox import ContainerRuntime, Task, base_environment
from .storage import Storage
from .volumes import Volumes
from .web_endpoints import WebEndpoints


@dataclass
class Launcher:
    """Creates and boots containers from these parts."""

    ids: Ids
    runtime: ContainerRuntime
    directory: Path
    socket_directory: Path
    apps: Apps
    images: Images
    mounts: Mounts
    secrets: Secrets
    volumes: Volumes
    storage: Storage
    web_endpoints: WebEndpoints
    transcript: Transcript
    snapshots_enabled: bool = True
    handlers: Handlers = field(init=False)

    def create(self, function: Function, *, with_snapshot: bool) -> Task:
        """Return the task of a container that is about to boot."""
        snapshots = with_snapshot and self.snapshots_enabled and function.app.is_deployed
        task_id = self.ids.new("ta")
        return Task(
            id=task_id,
            function=function,
            definition=function.definition,
            work=self.directory / f"task-{int(task_id[3:])}",
            socket_directory=self.socket_directory,
            is_snapshotting=snapshots and function.definition.checkpointing_enabled,
            loop=asyncio.get_running_loop(),
            on_line=lambda task, text: function.app.log.add(Line(task.id, (function.id, function.base_id), text)),
        )

    async def boot(self, task: Task) -> None:
        """Create the container's files and start its process."""
        task.root.mkdir(parents=True)
        self._lay_out_mounts(task)
        mounts = task.definition.volume_mounts
        task.volume_views = [self.volumes.view(mount, task.work) for mount in mounts]
        arguments = self._arguments(task)
        task.arguments_path.write_bytes(arguments.SerializeToString())
        socket = await self.listen(task)
        ports = [*self.runtime.host_ports, self.storage.port, *self.web_endpoints.ports]
        await task.boot(self.runtime, self._environment(task, socket), ports)

    async def listen(self, task: Task) -> Path:
        """Open another socket for the container; a restore moves it to a new one."""
        server: grpclib.server.Server = Endpoint(self.handlers, self.transcript, task).server()
        socket = self.socket_directory / f"{int(task.id[3:])}-{len(task.servers)}"
        await server.start(path=str(socket))
        task.servers.append(server)
        return socket

    def _lay_out_mounts(self, task: Task) -> None:
        for mount_id in task.definition.mount_ids:
            for name, (content, mode) in self.mounts.files(mount_id).items():
                path = task.work / name.lstrip("/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                path.chmod((mode & 0o777) or 0o644)

    def _arguments(self, task: Task) -> pb.ContainerArguments:
        definition = pb.Function()
        definition.CopyFrom(task.definition)
        definition.is_checkpointing_function = task.is_snapshotting
        return pb.ContainerArguments(
            task_id=task.id,
            function_id=task.function.id,
            app_id=task.function.app.id,
            function_def=definition,
            environment_name=ENVIRONMENT,
            serialized_params=task.function.params,
            app_layout=self.apps.layout(task.function.app),
            checkpoint_id=self.ids.new("ch") if task.is_snapshotting else "",
        )

    def _environment(self, task: Task, socket: Path) -> dict[str, str]:
        definition = task.definition
        environment = base_environment(task.root)
        directories = [str(lay_out_gpus(task)), str(Path(self.runtime.python).parent)]
        environment["PATH"] = ":".join([*directories, environment.get("PATH", "/usr/bin:/bin")])
        environment |= self.images.env(definition.image_id)
        environment |= self.secrets.environment(list(definition.secret_ids))
        environment |= self.runtime.environment
        environment |= {
            "MODAL_SERVER_URL": f"unix://{socket}",
            "MODAL_TASK_ID": task.id,
            "MODAL_IS_REMOTE": "1",
            "MODAL_IMAGE_ID": definition.image_id,
            "MODAL_ENVIRONMENT": ENVIRONMENT,
            "MODAL_CLOUD_PROVIDER": "CLOUD_PROVIDER_PLANE",
            "MODAL_REGION": "loopback",
            "MODAL_CONTAINER_ARGUMENTS_PATH": str(task.arguments_path),
            "MODAL_RESTORE_STATE_PATH": str(task.state_path),
        }
        if task.is_snapshotting:
            environment["MODAL_ENABLE_SNAP_RESTORE"] = "1"
        return environment
