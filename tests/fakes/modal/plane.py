"""Assembles the plane: its parts, the thread that they run on, and the interface for tests.

The plane runs on a thread and an event loop of its own: tests drive real clients as subprocesses and HTTP clients
synchronously, and would block a shared loop. Tests may read attributes from their own thread, since each is replaced or
appended to in one step; actions run on the loop.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import modal
from google.protobuf.message import Message
from grpclib import GRPCError
from modal_proto import api_pb2 as pb

from .apps import App, Apps
from .billing import Billing
from .calls import Calls
from .containers import Scheduler
from .dicts import Dicts
from .errors import NotDeployed, PlaneTimeout
from .fleet import Fleet
from .functions import Functions
from .ids import Ids
from .launch import Launcher
from .objects import Environments, Images, Mounts, Secrets
from .pools import Pool
from .proxy_tokens import ProxyTokens
from .rpc import Call, Endpoint, Handlers, Transcript
from .sandbox import ContainerRuntime, Task
from .snapshots import Snapshots
from .storage import Storage
from .volumes import Volumes
from .web_endpoints import WebEndpoints

if TYPE_CHECKING:
    import grpclib.server

TOKEN_ID, TOKEN_SECRET = "ak-plane", "as-plane"  # not checked
POLL_S, LONGEST_POLL_S = 0.02, 0.1  # many conditions ask the service over HTTP


class ModalPlane:
    """A control plane on loopback. A context manager; `start` and `close` do the same explicitly."""

    def __init__(self, workdir: Path, container: ContainerRuntime | None = None) -> None:
        runtime = container or ContainerRuntime()
        runtime.check()
        self.workdir = Path(workdir).resolve()
        self.workdir.mkdir(parents=True, exist_ok=True)
        self._sockets = Path(tempfile.mkdtemp(prefix="plane-"))  # short: a socket's path has 107 bytes at most
        self._record = Transcript()
        self._assemble(runtime)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="modal-plane", daemon=True)
        self._clients: list[modal.Client] = []
        self._server: grpclib.server.Server | None = None
        self.url = ""

    def _assemble(self, runtime: ContainerRuntime) -> None:
        ids = Ids()
        self.volumes = Volumes(ids, self.workdir / "volumes")
        self.storage = Storage(ids, self.volumes)
        self.secrets, self.images, mounts = Secrets(ids), Images(ids), Mounts(ids, self.storage)
        self.dicts, self.billing = Dicts(ids), Billing()
        self.web_endpoints = WebEndpoints()
        self._functions = Functions(ids, self.volumes, self.web_endpoints)
        self._apps = self._functions.apps = Apps(ids, self._functions)
        calls = Calls(ids, self._functions)
        self.web_endpoints.functions, self.web_endpoints.calls = self._functions, calls
        launcher = Launcher(
            ids=ids,
            runtime=runtime,
            directory=self.workdir,
            socket_directory=self._sockets,
            apps=self._apps,
            images=self.images,
            mounts=mounts,
            secrets=self.secrets,
            volumes=self.volumes,
            storage=self.storage,
            web_endpoints=self.web_endpoints,
            transcript=self._record,
        )
        self._scheduler = Scheduler(self._functions, calls, launcher)
        self.snapshots = Snapshots(launcher)
        self._apps.stop_containers, self._apps.published = self._scheduler.stop_app, self._scheduler.published
        self._apps.running = self._scheduler.running
        account = (Environments(ids), self.billing, self.secrets)
        objects = (*account, mounts, self.images, self.volumes, self.dicts, self.storage)
        running = (self._apps, self._functions, calls, self._scheduler, Fleet(self._scheduler, self._functions))
        self._handlers = launcher.handlers = Handlers(
            (*objects, *running, self.snapshots, self.web_endpoints.proxy_tokens)
        )

    # start and close

    def start(self) -> Self:
        self._thread.start()
        self._do(self._listen())
        return self

    def close(self) -> None:
        """Kill every container and close every port. Idempotent."""
        for client in self._clients:
            client.close()
        if self._thread.is_alive():
            self._do(self._close(), timeout_s=30)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
        shutil.rmtree(self._sockets, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _listen(self) -> None:
        self._server = Endpoint(self._handlers, self._record).server()
        await self.storage.start()
        listening = socket.create_server(("127.0.0.1", 0))
        # asyncio sets it for a connection only where its listening socket was made with the protocol's number; without
        # it each answer waits 40 ms for the client's acknowledgement
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await self._server.start(sock=listening)
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"

    async def _close(self) -> None:
        await self._scheduler.close()
        await self.web_endpoints.close()
        await self.storage.close()
        if self._server is not None:
            self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _do(self, coroutine: Coroutine[Any, Any, None], timeout_s: float = 10) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout_s)

    # for clients

    @property
    def env(self) -> dict[str, str]:
        """Environment variables that point a client at the plane and away from any Modal account of this machine."""
        return {
            "MODAL_SERVER_URL": self.url,
            "MODAL_TOKEN_ID": TOKEN_ID,
            "MODAL_TOKEN_SECRET": TOKEN_SECRET,
            "MODAL_ENVIRONMENT": "main",
            "MODAL_CONFIG_PATH": str(self.workdir / "modal.toml"),
        }

    def client(self) -> modal.Client:
        """Return a client in this process, for `modal.Cls.from_name(..., client=...)`."""
        client = modal.Client(self.url, pb.CLIENT_TYPE_CLIENT, (TOKEN_ID, TOKEN_SECRET))
        client._open()
        self._clients.append(client)
        return client

    # for tests

    @property
    def proxy_tokens(self) -> ProxyTokens:
        return self.web_endpoints.proxy_tokens

    @property
    def apps(self) -> dict[str, App]:
        """Apps by name; of two with one name the deployed one, else the newest."""
        named = {app.name: app for app in self._apps.all()}
        return named | {app.name: app for app in self._apps.all() if app.is_deployed}

    @property
    def tasks(self) -> list[Task]:
        return self._scheduler.tasks

    @property
    def pools(self) -> list[Pool]:
        return list(self._scheduler.pools.values())

    @property
    def transcript(self) -> list[Call]:
        return self._record.calls

    @property
    def unknown_calls(self) -> list[str]:
        return self._record.unknown

    @property
    def failures(self) -> list[str]:
        """Errors inside the plane; tests assert that it is empty."""
        return self._record.failures

    def refuse(self, name: str, error: GRPCError | None) -> None:
        """Answer every call of that name with the error from now on; None: as usual again."""
        if error is None:
            self._record.refused.pop(name, None)
        else:
            self._record.refused[name] = error

    def calls(self, name: str) -> list[Message]:
        """Return the requests of the call of that name, in order."""
        return [call.request for call in list(self._record.calls) if call.name == name]

    def function(self, app: str, tag: str) -> pb.Function:
        """Return a definition as deployed. Raises: NotDeployed."""
        published = self.apps.get(app)
        if published is None or tag not in published.functions:
            known = {name: sorted(other.functions) for name, other in self.apps.items()}
            raise NotDeployed(f"No function {tag!r} in app {app!r}. Published: {known or 'nothing'}.")
        return published.functions[tag]

    def url_of(self, app: str, tag: str, method: str = "") -> str:
        """Return the URL of a web method of a class, or of a web function. Raises: NotDeployed."""
        definition = self.function(app, tag)
        if method and method not in definition.method_definitions:
            raise NotDeployed(f"No method {method!r} in {app}.{tag}: {sorted(definition.method_definitions)}.")
        url = definition.method_definitions[method].web_url if method else definition.web_url
        if not url:
            raise NotDeployed(f"{app}.{tag}{'.' if method else ''}{method} is not served over HTTP.")
        return url

    def wait_until(self, condition: Callable[[], object], timeout_s: float, what: str = "the condition") -> None:
        """Poll the condition. Raises: PlaneTimeout with the end of every container's log."""
        deadline, pause_s = time.monotonic() + timeout_s, POLL_S
        while not condition():
            if time.monotonic() > deadline:
                logs = "".join(f"\n--- {task.id} ({task.state}):\n{task.log[-1500:]}" for task in self.tasks)
                raise PlaneTimeout(f"Waited {timeout_s} s in vain for {what}.{logs}")
            time.sleep(pause_s)
            pause_s = min(1.2 * pause_s, LONGEST_POLL_S)
