"""What the command line and a deploy request from Modal: boot records, prefetches, whether a secret exists."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import modal

from service.boots.records import DIRECTORY, BootRecord, parse
from service.errors import ServiceError
from service.modal_app.deployment import hub_secret, missing_hub_secret
from service.modal_app.prefetch import application
from service.settings import Settings
from service.volumes import HUB_CACHE, VLLM_CACHE, volume_name
from service.weights.prefetch import PrefetchEvent, PrefetchRequest

_READERS = 16  # a file takes two round trips; hundreds of them one after the other would take a minute


def boots_volume(volume_prefix: str | None) -> str:
    """Return the name of the volume on which replicas record their boots."""
    return volume_name(VLLM_CACHE, volume_prefix)


def boots(volume_prefix: str | None) -> list[BootRecord]:
    """Return the records of the deployed service's boots, oldest first; none where none has booted yet. Blocks.

    Raises:
        ServiceError: There is no account, no such volume, or Modal cannot be reached.
    """
    name = boots_volume(volume_prefix)
    volume = modal.Volume.from_name(name)
    try:
        volume.hydrate()
        return parse(_lines(volume))
    except modal.exception.NotFoundError as error:
        raise ServiceError(
            f"Modal has no volume '{name}' in this workspace and environment.",
            hint="The first deploy makes it: modal deploy -m service.server. MODAL_PROFILE and MODAL_ENVIRONMENT "
            "choose another workspace and environment, SERVICE_VOLUME_PREFIX another volume.",
        ) from error
    except modal.exception.AuthError as error:
        raise ServiceError(
            f"Modal refused to open volume '{name}': this machine has no Modal token, or an invalid one.",
            hint="Run 'modal setup', or leave --modal out for the boots of this machine.",
        ) from error
    except (modal.exception.Error, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ServiceError(
            f"Volume '{name}' cannot be read from Modal: {reason}.",
            hint="Try again, or leave --modal out for the boots of this machine.",
        ) from error


def _lines(volume: modal.Volume) -> list[bytes]:
    try:
        entries = volume.listdir(DIRECTORY)
    except (modal.exception.NotFoundError, FileNotFoundError):  # no replica has booted yet
        return []
    paths = [entry.path for entry in entries if entry.path.endswith(".json")]

    def read(path: str) -> bytes:
        try:
            return b"".join(volume.read_file(path))
        except (modal.exception.NotFoundError, FileNotFoundError):  # a replica has just removed it, or a directory
            return b""

    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(read, paths))


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


def prefetch(request: PrefetchRequest, settings: Settings) -> Iterator[PrefetchEvent]:
    """Run the prefetch in a Modal function without a GPU, on the volume of the hub's cache, and yield its events.

    Args:
        request: What to do.
        settings: Name the secret with HF_TOKEN and the prefix of the volume.

    Raises:
        ServiceError: There is no account or no such secret, Modal cannot be reached, or a model cannot be fetched.
        KeyboardInterrupt: It was interrupted; the function has been ended.
    """
    secret, volume_prefix = hub_secret(request.specs, settings.hub_secret), settings.volume_prefix
    app, function = application(secret, volume_prefix)
    interrupted, call_id = False, ""
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
            except KeyboardInterrupt:  # app.run() would swallow it
                interrupted = True
                if call_id:  # then it commits what is finished and releases its lease before the app is ended
                    modal.FunctionCall.from_id(call_id).cancel()
        if interrupted:
            raise KeyboardInterrupt


@contextmanager
def _translate_errors(secret: str | None, volume: str) -> Iterator[None]:
    try:
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
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ServiceError(
            f"The prefetch on Modal was interrupted: {reason}.",
            hint="Finished files are kept; run the same command again to continue.",
        ) from error
