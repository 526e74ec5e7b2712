"""What the command line and a deploy request from Modal: boot records, prefetches, whether a secret exists."""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import modal

from service.boots.records import DIRECTORY, BootRecord, parse, state_directory
from service.errors import ServiceError, one_line
from service.interrupts import not_lost
from service.modal_app.deployment import hub_secret, missing_hub_secret
from service.modal_app.prefetch import application
from service.settings import Settings
from service.usage import shared, writer_files
from service.usage.database import Database, open_database
from service.volumes import HUB_CACHE, VLLM_CACHE, volume_name
from service.weights.prefetch import PrefetchEvent, PrefetchRequest

_KINDS = ((writer_files.REPLICAS, ".json"), (writer_files.GATEWAYS, ".json"), (writer_files.REQUESTS, ".jsonl"))
_READERS = 16  # a file takes two round trips; hundreds of them one after the other would take a minute


def boots_volume(volume_prefix: str | None) -> str:
    """Return the name of the volume on which replicas record their boots."""
    return volume_name(VLLM_CACHE, volume_prefix)


def boots(volume_prefix: str | None) -> list[BootRecord]:
    """Return the records of the deployed service's boots, oldest first; none where none has booted yet. Blocks.

    Raises:
        ServiceError: There is no account, no such volume, or Modal cannot be reached.
    """
    with _opened(boots_volume(volume_prefix), "for the boots of this machine") as volume:
        return parse(content for _, content in _files(volume, DIRECTORY, ".json"))


def usage_database(volume_prefix: str | None) -> Database:
    """Return the deployed service's usage: a database of this machine that gets what is new on the volume. Blocks.

    Raises:
        ServiceError: There is no account, no such volume, or Modal cannot be reached.
    """
    with _opened(boots_volume(volume_prefix), "for the usage of this machine") as volume:
        database = open_database(file=state_directory() / f"usage-{volume.object_id}.sqlite3")
        try:
            for kind, suffix in _KINDS:
                files = _files(
                    volume, f"{writer_files.DIRECTORY}/{kind}", suffix, partial(shared.imported_files, database)
                )
                shared.import_files(database, files)
        except BaseException:
            database.close()
            raise
        return database


@contextmanager
def _opened(name: str, otherwise: str) -> Iterator[modal.Volume]:
    volume = modal.Volume.from_name(name)
    try:
        with not_lost():
            volume.hydrate()
            yield volume
    except modal.exception.NotFoundError as error:
        raise ServiceError(
            f"Modal has no volume '{name}' in this workspace and environment.",
            hint="The first deploy makes it: vllm-service deploy. MODAL_PROFILE and MODAL_ENVIRONMENT "
            "choose another workspace and environment, SERVICE_VOLUME_PREFIX another volume.",
        ) from error
    except modal.exception.AuthError as error:
        raise ServiceError(
            f"Modal refused to open volume '{name}': this machine has no Modal token, or an invalid one.",
            hint=f"Run 'modal setup', or leave --modal out {otherwise}.",
        ) from error
    except (modal.exception.Error, OSError) as error:
        raise ServiceError(
            f"Volume '{name}' cannot be read from Modal: {one_line(error)}.",
            hint=f"Try again, or leave --modal out {otherwise}.",
        ) from error


def _files(
    volume: modal.Volume,
    directory: str,
    suffix: str,
    known: Callable[[Iterable[str]], Container[str]] = lambda _: (),
) -> list[tuple[str, bytes]]:
    """Return path, from the last directory on, and content of the files in a directory that are not known yet."""
    try:
        entries = volume.listdir(directory)
    except (modal.exception.NotFoundError, FileNotFoundError):  # no replica has booted yet
        return []
    parent = directory.rpartition("/")[2]
    paths = [f"{parent}/{entry.path.rpartition('/')[2]}" for entry in entries if entry.path.endswith(suffix)]
    old = known(paths)
    paths = [path for path in paths if path not in old]

    def read(path: str) -> bytes:
        try:
            return b"".join(volume.read_file(f"{directory}/{path.rpartition('/')[2]}"))
        except (modal.exception.NotFoundError, FileNotFoundError):  # a replica has just removed it, or a directory
            return b""

    with ThreadPoolExecutor(_READERS) as pool:
        return list(zip(paths, pool.map(read, paths), strict=True))


def in_modal_command() -> bool:
    """Tell whether Modal's own command (`deploy`, `run`, `serve`, `shell`) is what imports this program.

    Its command line is click's, whose context is there only while a command runs.
    """
    import click  # noqa: PLC0415 - Modal's command line brings it; a container needs none

    return click.get_current_context(silent=True) is not None


def why_hub_secret_missing(secret: str) -> str | None:
    """Return Modal's reason why it has no such secret with HF_TOKEN; None when it has, or cannot be reached. Blocks."""
    try:
        modal.Secret.from_name(secret, required_keys=["HF_TOKEN"]).hydrate()
    except (modal.exception.NotFoundError, modal.exception.InvalidError) as error:
        return " ".join(str(error).split())
    except (modal.exception.Error, OSError):  # the deploy itself then fails with the reason
        return None
    return None


def prefetch(request: PrefetchRequest, settings: Settings) -> Generator[PrefetchEvent]:
    """Run the prefetch in a Modal function without a GPU, on the volume of the hub's cache, and yield its events.

    Closing the generator ends the function.

    Args:
        request: What to do.
        settings: Name the secret with HF_TOKEN and the prefix of the volume.

    Raises:
        ServiceError: There is no account or no such secret, Modal cannot be reached, or a model cannot be fetched.
        KeyboardInterrupt: It was interrupted; the function has been ended.
    """
    secret, volume_prefix = hub_secret(request.specs, settings.hub_secret), settings.volume_prefix
    app, function = application(secret, volume_prefix)
    interrupt: BaseException | None = None
    call_id = ""
    with _translate_errors(secret, volume_name(HUB_CACHE, volume_prefix)):
        with app.run():
            try:
                for event in function.remote_gen(request.model_dump_json(), volume_prefix):
                    if isinstance(event, str):
                        call_id = event
                    elif isinstance(event, dict):
                        raise ServiceError.from_fields(event)
                    else:
                        yield event
            except (
                KeyboardInterrupt,
                GeneratorExit,
            ) as error:  # here or in the reader; app.run() would swallow the first
                interrupt = error
                if call_id:  # then it commits what is finished and releases its lease before the app is ended
                    modal.FunctionCall.from_id(call_id).cancel()
        if interrupt:
            raise interrupt


@contextmanager
def _translate_errors(secret: str | None, volume: str) -> Iterator[None]:
    try:
        with not_lost():
            yield
    except modal.exception.AuthError as error:
        raise ServiceError(
            f"Modal refused to prefetch into volume '{volume}': this machine has no Modal token, or an invalid one.",
            hint="Run 'modal setup', or leave --modal out to fetch into this machine's cache.",
        ) from error
    except (modal.exception.NotFoundError, modal.exception.InvalidError) as error:
        reason = " ".join(str(error).split())
        if secret and secret in reason:
            raise missing_hub_secret(secret, reason) from error
        raise ServiceError(f"Modal refused to run the prefetch: {reason}.") from error
    except (modal.exception.Error, OSError) as error:
        raise ServiceError(
            f"The prefetch on Modal was interrupted: {one_line(error)}.",
            hint="Finished files are kept; run the same command again to continue.",
        ) from error
