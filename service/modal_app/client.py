"""What the command line and a deploy ask of Modal. Refused: anything that a deployed class does by itself."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import click  # Modal's command line is made with it
import modal

from service import errors
from service.boots.records import DIRECTORY, BootRecord, parse
from service.errors import ServiceError
from service.modal_app.deployment import no_hub_token
from service.modal_app.prefetch import application
from service.volumes import HUB_CACHE, MOUNTS, VLLM_CACHE
from service.weights.prefetch import Order, Word

BOOTS_VOLUME, HUB_VOLUME = MOUNTS[VLLM_CACHE], MOUNTS[HUB_CACHE]
_AT_A_TIME = 16  # a file is two round trips; hundreds of them one after the other would take a minute


def boots() -> list[BootRecord]:
    """Return the records of the deployed service's boots, oldest first; none where none has booted yet. Blocks.

    Raises:
        ServiceError: There is no account, no such volume, or Modal cannot be reached.
    """
    volume = modal.Volume.from_name(BOOTS_VOLUME)
    try:
        volume.hydrate()
        return parse(_lines(volume))
    except modal.exception.NotFoundError as error:
        raise ServiceError(
            f"Modal has no volume '{BOOTS_VOLUME}' in this workspace and environment. The first deploy makes it: "
            "modal deploy -m service.server. MODAL_PROFILE and MODAL_ENVIRONMENT choose another."
        ) from error
    except modal.exception.AuthError as error:
        raise ServiceError(
            f"Modal does not know who asks for volume '{BOOTS_VOLUME}': no token, or one that is not valid. "
            "Run 'modal setup', or leave --modal out for the boots of this machine."
        ) from error
    except (modal.exception.Error, OSError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ServiceError(
            f"Volume '{BOOTS_VOLUME}' cannot be read from Modal: {said}. "
            "Try again, or leave --modal out for the boots of this machine."
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

    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        return list(pool.map(read, paths))


def in_modal_command() -> bool:
    """Tell whether Modal's own command (`deploy`, `run`, `serve`, `shell`) is what imports this program.

    Its command line is click's, whose context is there only while a command runs.
    """
    return click.get_current_context(silent=True) is not None


def missing_hub_token(secret: str) -> str | None:
    """Return why Modal has no such secret with HF_TOKEN, in its words; None when it has, or cannot be asked. Blocks."""
    try:
        modal.Secret.from_name(secret, required_keys=["HF_TOKEN"]).hydrate()
    except (modal.exception.NotFoundError, modal.exception.InvalidError) as error:
        return " ".join(str(error).split())
    except (modal.exception.Error, OSError):  # what the deploy itself fails at, and then says
        return None
    return None


def prefetch(order: Order, secret: str | None) -> Iterator[Word]:
    """Have a CPU-only function of Modal's do the order with the volume `huggingface-cache`, and tell what happens.

    Args:
        order: What is to be done.
        secret: Name of the secret with HF_TOKEN, for gated models.

    Raises:
        ServiceError: There is no account or no such secret, Modal cannot be reached, or a model cannot be had.
        KeyboardInterrupt: It was interrupted; the function has been ended.
    """
    app, function = application(secret)
    interrupted, call_id = False, ""
    with _explained(secret):
        with app.run():
            try:
                for word in function.remote_gen(order.model_dump_json()):
                    if isinstance(word, str):
                        call_id = word
                    elif isinstance(word, tuple):
                        raise getattr(errors, word[0])(word[1])
                    else:
                        yield word
            except KeyboardInterrupt:  # app.run() would swallow it
                interrupted = True
                if call_id:  # then it commits what is finished and gives its lock back before the app is ended
                    modal.FunctionCall.from_id(call_id).cancel()
        if interrupted:
            raise KeyboardInterrupt


@contextmanager
def _explained(secret: str | None) -> Iterator[None]:
    try:
        yield
    except modal.exception.AuthError as error:
        raise ServiceError(
            f"Modal does not know who asks to fill volume '{HUB_VOLUME}': no token, or one that is not valid. "
            "Run 'modal setup', or leave --modal out to fetch into this machine's cache."
        ) from error
    except (modal.exception.NotFoundError, modal.exception.InvalidError) as error:
        said = " ".join(str(error).split())
        if secret and secret in said:
            raise no_hub_token(secret, said) from error
        raise ServiceError(f"Modal refuses to run the prefetch: {said}.") from error
    except (modal.exception.Error, OSError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ServiceError(
            f"The prefetch on Modal broke off: {said}. What was finished is kept; the same command goes on from there."
        ) from error
