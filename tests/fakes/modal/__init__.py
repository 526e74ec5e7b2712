"""A Modal control plane on loopback, for the real client and the real container runtime, without an account.

It speaks the protocol of the pinned `modal` client: `modal deploy`, `modal run`, look-ups, `.remote`, `.remote_gen`,
`.spawn`, `.map`, web endpoints (`web_server`, `asgi_app`), checkpoints and restores work. A container is
a subprocess of `modal._container_entrypoint` with its own network namespace (each can use port 8000), its own unix
socket, and HOME at `<workdir>/<task>/root`, where mounts and volumes lie. The image is recorded, its ENV applied,
nothing installed: what the image would install is what `ContainerRuntime.python` has.
`ContainerRuntime(host_ports=(8123,))` lets containers reach a server of the test, such as a stand-in for the model hub,
at 127.0.0.1:8123. Containers also reach the URLs of all apps' web functions.

    runtime = ContainerRuntime(python="/path/to/venv/bin/python", client_path=client_directory(tmp / "client"))
    with ModalPlane(tmp, container=runtime) as plane:
        plane.secrets.put("huggingface", {"HF_TOKEN": "t"})
        plane.volumes.put("huggingface-cache", {"hub/seed.txt": b"1"})
        token = plane.proxy_tokens.create()
        subprocess.run([sys.executable, "-m", "modal", "deploy", "-m", "service.server"], env=os.environ | plane.env)
        url = plane.url_of("vllm-h100", "Server", "serve")               # http://127.0.0.1:<port>
        urlopen(Request(url + "/health?model=qwen3-8b", headers=token.headers))

The interface for tests (all thread-safe; the plane has a thread and an event loop of its own):

    plane.env                    MODAL_* variables that point a client subprocess at the plane (merge into its own)
    plane.client()               a `modal.Client` in this process, for `modal.Cls.from_name(..., client=...)`
    plane.url_of(app, cls, m)    URL of a web method; url_of(app, function) of a web function
    plane.apps[name]             App: app_id, state, versions, functions {tag: modal_proto Function}, classes
    plane.function(app, tag)     the definition as deployed (tag "Server" means the class's service function)
    plane.secrets                put(name, dict), get(name), remove(name), names()
    plane.proxy_tokens           create() -> ProxyToken(key, secret), .headers, .bearer; revoke(token)
    plane.volumes                put(name, files), [name] -> Volume: path (what is committed), files(), read(rel),
                                 write(rel, bytes), remove(rel), commits, capacity_bytes (None; ENOSPC beyond it)
    plane.dicts                  put(name), [name] -> Dict: [key], [key] = value, key in, keys()
    plane.images                 layers(image_id) -> Dockerfile commands, base first; env(image_id)
    plane.tasks                  containers, oldest first: id, app, tag, parameters, gpu, state, pid, exit_code, log,
                                 root, inputs_served, restored, result, left_behind; preempt(grace_s=30), kill(),
                                 members()
    plane.pools                  app, tag, parameters, gpu, autoscaler, queued, tasks (live ones), most_queued_cold
    plane.snapshots              enabled, freeze_s, environment (changes that appear at restore), fail_next_restore(),
                                 fail_next_gpu_restore(), before_restore (callables of the task: change volumes, …),
                                 checkpoints (task ids)
    plane.web_endpoints          redirect_after_s (150.0), requests [(method, path, status)]; 499: the client left;
                                 faults {app: Faults}
    plane.transcript             [Call(name, caller, request, at)]; caller is "client" or a task id
    plane.calls(name)            the requests of that name; plane.unknown_calls: names answered UNIMPLEMENTED;
                                 plane.failures: errors inside the plane, for `assert plane.failures == []`
    plane.wait_until(f, s, what) poll (100 ms at most) until f() is true, else PlaneTimeout with the logs' ends

Task states: STARTING (imports, hooks), READY (fetches inputs), STOPPING (was asked to stop), DEAD.
The plane rejects calls and options that it does not know, with their names; a modal client that is not the pinned
release or a newer patch of it, in this process and over the network; and a container interpreter of another Python
version than the client directory's (compiled dependencies would not load).
Different from Modal: `nvidia-smi` is a script that lists the GPUs which Modal would attach. A restore continues the
process that was checkpointed (frozen, thawed, with a new task id, socket and environment). A second container of a pool
boots from scratch, since a process cannot be copied. The plane buffers 1 MiB of a response for a slow reader and 64 MiB
of a request for its container; Modal documents no figures. Modal's client inside the container buffers more.
"""

from typing import TYPE_CHECKING, NoReturn

import modal

from .client_version import why_refused
from .errors import (
    ClientDirectoryError,
    ClientVersionUnsupported,
    ContainerRuntimeError,
    NotDeployed,
    PlaneError,
    PlaneTimeout,
)

_REFUSED = why_refused(modal.__version__)

if TYPE_CHECKING or _REFUSED is None:
    from .client_directory import client_directory
    from .plane import ModalPlane
    from .rpc import Call
    from .sandbox import ContainerRuntime, TaskState
else:  # the modules above import private ones of modal, which another version may not have

    def __getattr__(name: str) -> NoReturn:
        """Raise ClientVersionUnsupported when a part of the plane is imported."""
        if name in __all__:
            raise ClientVersionUnsupported(_REFUSED)
        raise AttributeError(name)


__all__ = [
    "Call",
    "ClientDirectoryError",
    "ClientVersionUnsupported",
    "ContainerRuntime",
    "ContainerRuntimeError",
    "ModalPlane",
    "NotDeployed",
    "PlaneError",
    "PlaneTimeout",
    "TaskState",
    "client_directory",
]
