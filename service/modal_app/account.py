"""The account at Modal as the command line needs it: apps and their versions, secrets, proxy tokens, pools. Blocks.

Where Modal's client has no public call (versions, rollback, stop, layout of an app), this sends the request that
Modal's own command sends; the client's version is pinned, and the contract tests run it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import modal
from modal._utils.async_utils import synchronizer
from modal.client import _Client
from modal.config import config
from modal_proto import api_pb2 as pb

from service.errors import ServiceError, one_line
from service.interrupts import not_lost

_SERVER, _GATEWAY = "Server.*", "serve"  # tags of what the two modules publish
_AT_ONCE = 8


@dataclass(frozen=True)
class App:
    """A deployed app; `replicas` are its running containers."""

    id: str
    name: str
    replicas: int = 0


@dataclass(frozen=True)
class Layout:
    """What an app consists of.

    Attributes:
        url: Of a tier's `serve` or of the gateway; None: it is neither.
        endpoints: How many web endpoints it has.
    """

    url: str | None
    endpoints: int


@dataclass(frozen=True)
class Version:
    """The version that an app has, after rollbacks: number, tag, and the one before it (None: it is the first)."""

    number: int
    tag: str
    before: int | None


@contextmanager
def translate_errors(doing: str) -> Iterator[None]:
    """Turn errors of Modal's client into one sentence: `doing` completes "Modal refused to …". It loses no Ctrl-C."""
    try:
        with not_lost():
            yield
    except modal.exception.AuthError as error:
        raise ServiceError(
            f"Modal refused to {doing}: this machine has no Modal token, or an invalid one.",
            hint="Run 'modal setup'; on a machine without a browser set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET.",
        ) from error
    except modal.exception.PermissionDeniedError as error:
        raise ServiceError(
            f"Modal refused to {doing}: {one_line(error)}.",
            hint="Ask an owner of the workspace for the right to do so, or choose another workspace (MODAL_PROFILE).",
        ) from error
    except (modal.exception.ConnectionError, TimeoutError) as error:
        raise ServiceError(
            f"Modal did not answer the request to {doing}: {one_line(error)}.",
            hint="Check this machine's connection; status.modal.com tells of outages.",
        ) from error
    except (modal.exception.Error, OSError) as error:
        if isinstance(error, OSError) and error.filename:  # of this machine
            raise
        raise ServiceError(f"Modal refused to {doing}: {one_line(error)}.") from error


@synchronizer.create_blocking
async def _send(call: str, request: Any) -> Any:
    client = await _Client.from_env()
    return await getattr(client._stub, call)(request)


def environment() -> str:
    """Return the name of the environment that is used; empty: the workspace's default."""
    return config["environment"] or ""


def connect() -> str:
    """Check the login and the environment; return the name of the workspace.

    Raises:
        ServiceError: There is no account, no such environment, or Modal does not answer.
    """
    with translate_errors("open this account"):
        workspace = modal.Workspace.from_context().hydrate().name or ""
    check_environment()
    return workspace


def check_environment() -> None:
    """Insist on the environment that is used, where it was named.

    Raises:
        ServiceError: There is none of that name, no account, or Modal does not answer.
    """
    if name := environment():
        with translate_errors(f"open environment '{name}'"):
            try:
                modal.Environment.from_name(name).hydrate()
            except modal.exception.NotFoundError as error:
                raise ServiceError(
                    f"Modal has no environment '{name}' in this workspace.",
                    hint=f"Make it: modal environment create {name}. 'modal environment list' shows all.",
                ) from error


def deployed_apps() -> dict[str, App]:
    """Return the deployed apps of the environment by name."""
    with translate_errors("list the apps"):
        apps = _send("AppList", pb.AppListRequest(environment_name=environment())).apps
    return {
        app.name: App(app.app_id, app.name, app.n_running_tasks) for app in apps if app.state == pb.APP_STATE_DEPLOYED
    }


def layouts(apps: Iterable[App]) -> dict[str, Layout]:
    """Return the layouts of apps by name; one that is stopped meanwhile is left out."""
    found: dict[str, Layout] = {}

    def read(app: App) -> None:
        with suppress(modal.exception.NotFoundError):
            found[app.name] = _layout(_send("AppGetLayout", pb.AppGetLayoutRequest(app_id=app.id)).app_layout)

    with translate_errors("describe the apps"), ThreadPoolExecutor(_AT_ONCE) as threads:
        list(threads.map(read, apps))
    return found


def class_function_id(app: App) -> str:
    """Return the id of the function that all pools of a tier's app are variants of; empty: the app has none."""
    with translate_errors(f"describe app '{app.name}'"):
        layout = _send("AppGetLayout", pb.AppGetLayoutRequest(app_id=app.id)).app_layout
    return str(layout.function_ids.get(_SERVER, ""))


def _layout(layout: Any) -> Layout:
    urls: dict[str, str] = {}
    for item in layout.objects:
        handle = item.function_handle_metadata
        urls |= {item.object_id: handle.web_url} if handle.web_url else {}
        methods = handle.method_handle_metadata.items()
        urls |= {f"{item.object_id}.{name}": method.web_url for name, method in methods if method.web_url}
    server, gateway = layout.function_ids.get(_SERVER), layout.function_ids.get(_GATEWAY)
    return Layout(urls.get(f"{server}.serve") or urls.get(gateway or ""), len(urls))


def version(app: App) -> Version:
    """Return the version that an app has, by its history of deploys."""
    with translate_errors(f"read the versions of app '{app.name}'"):
        history = _send("AppDeploymentHistory", pb.AppDeploymentHistoryRequest(app_id=app.id))
    entries = history.app_deployment_histories
    by_number = {entry.version: entry for entry in entries}
    if not by_number:
        return Version(0, "", None)
    number = history.production_app_version or max(by_number)  # a later one may be staged
    while (entry := by_number.get(number)) and entry.rollback_version:
        number = entry.rollback_version
    before = [other.version for other in entries if other.version < number and not other.rollback_version]
    return Version(number, entry.tag if entry else "", max(before, default=None))


def roll_back(app: App, number: int) -> None:
    """Deploy an earlier version of an app again."""
    with translate_errors(f"roll back app '{app.name}'"):
        _send("AppRollback", pb.AppRollbackRequest(app_id=app.id, version=number))


def stop(app: App) -> None:
    """Stop an app: its containers end, and its name is free."""
    with translate_errors(f"stop app '{app.name}'"):
        _send("AppStop", pb.AppStopRequest(app_id=app.id, source=pb.APP_STOP_SOURCE_CLI))


def why_secret_unusable(name: str, *choices: list[str]) -> tuple[bool, str | None]:
    """Return whether the secret exists, and Modal's reason why it has the keys of none of the choices; None: it has."""
    exists, why = False, None
    for keys in choices:
        with translate_errors(f"look up secret '{name}'"):
            try:
                modal.Secret.from_name(name, required_keys=keys).hydrate()
            except modal.exception.NotFoundError as error:
                return False, one_line(error)
            except modal.exception.InvalidError as error:  # it lacks one
                exists, why = True, why or one_line(error)
            else:
                return True, None
    return exists, why


def create_secret(name: str, values: dict[str, str]) -> bool:
    """Create a secret; False: there is one of that name already, which is left as it is."""
    with translate_errors(f"create secret '{name}'"):
        try:
            modal.Secret.objects.create(name, values)
        except modal.exception.AlreadyExistsError:
            return False
    return True


@contextmanager
def new_proxy_token(name: str) -> Iterator[dict[str, str]]:
    """Create a proxy token and yield it as the values of its secret; it is deleted again where the block fails.

    Where the workspace scopes tokens to environments, it is allowed in the one that is used.
    """
    with translate_errors("create a proxy token"):
        tokens = modal.Workspace.from_context().proxy_tokens
        token = tokens.create(name=name)
    try:
        with translate_errors("allow the proxy token in this environment"):
            if any(other.scoped for other in tokens.list() if other.token_id == token.token_id):
                tokens.allow(token.token_id, modal.Environment.from_context().hydrate().name or "")
        yield {"MODAL_KEY": token.token_id, "MODAL_SECRET": token.token_secret}
    except BaseException:
        with suppress(modal.exception.Error, OSError):  # the block's own error is the one to report
            tokens.delete(token.token_id)
        raise


@cache
def pool(app: str, model: str) -> Any:
    """Return the pool of a model on a tier; kept, since Modal's client looks each up in four requests (0.2 s)."""
    return modal.Cls.from_name(app, "Server")(model=model).serve


def set_autoscaler(app: str, model: str, **settings: int | None) -> Any:
    """Set what Modal's autoscaler keeps of a model's pool until its app is deployed again; return all its settings."""
    with translate_errors(f"scale model '{model}' of app '{app}'"):
        return pool(app, model).autoscaler.update(**settings)


def autoscaler(app: str, model: str) -> Any:
    """Return the settings of Modal's autoscaler for a model's pool."""
    with translate_errors(f"describe model '{model}' of app '{app}'"):
        return pool(app, model).autoscaler.settings()


def replicas(app: str, model: str) -> int:
    """Return how many replicas a model's pool has."""
    with translate_errors(f"count the replicas of model '{model}' of app '{app}'"):
        return int(pool(app, model).get_current_stats().num_total_runners)
