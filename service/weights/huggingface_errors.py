"""What is said when the hub refuses or does not answer, or the disk is full: what happened, and the next step."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from service.errors import DiskSpaceError, GatedModelError, ServiceError, WeightsError
from service.weights.files import Wanted
from service.weights.manifest import hub_cache

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

ADVICE = "Check the connection; HF_ENDPOINT names another hub. The model 'tiny' needs none."
_FULL = {errno.ENOSPC: "is full", errno.EDQUOT: "has used up its quota", errno.EFBIG: "takes no file so large"}


def endpoint() -> str:
    """Return the hub's address."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


@contextmanager
def explained(wanted: Wanted, token: str | None) -> Iterator[None]:
    """Turn what the client raises into a sentence with the next step.

    Raises:
        GatedModelError: The hub wants a token of somebody who accepted the model's licence.
        DiskSpaceError: The disk or the volume is full.
        WeightsError: Anything else.
    """
    try:
        yield
    except ServiceError:
        raise
    except Exception as error:
        raise _sentence(wanted, token, error) from error


def _sentence(wanted: Wanted, token: str | None, error: Exception) -> ServiceError:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415 - only hub models need it

    if why := why_full(error):
        return DiskSpaceError(
            f"{hub_cache()} {why} ({shutil.disk_usage(hub_cache()).free / 1e9:.1f} GB free) and {wanted.at} is not "
            "complete. Free some, or set HF_HOME to a directory on a larger disk, and start again: finished files are "
            "kept."
        )
    for cause in (error, error.__cause__):
        if isinstance(cause, HfHubHTTPError) and (refusal := _refusal(wanted, token, cause)):
            return refusal
    why = _first_line(error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error)
    return WeightsError(f"{wanted.at} cannot be fetched from {endpoint()}: {why} {ADVICE}")


def _refusal(wanted: Wanted, token: str | None, error: HfHubHTTPError) -> WeightsError | None:
    from huggingface_hub import errors, get_token  # noqa: PLC0415 - only hub models need it

    hub_id, page, tokens = wanted.hub_id, f"{endpoint()}/{wanted.hub_id}", f"{endpoint()}/settings/tokens"
    sentence = None
    match error:
        case errors.GatedRepoError():
            return GatedModelError(_gated(hub_id, page, has_token=bool(token or get_token())))
        case errors.RevisionNotFoundError():
            sentence = f"{hub_id} has no revision '{wanted.revision}'. Correct the entry's revision."
        case errors.DisabledRepoError():
            sentence = f"The hub has disabled {hub_id}. Look up why at {page}, or choose another model."
        case errors.RepositoryNotFoundError():
            sentence = (
                f"The hub has no repository '{hub_id}' (any more), or it is private and the token has no access. "
                f"Look it up at {page}."
            )
        case _ if error.response.status_code == 401:
            sentence = (
                f"{endpoint()} does not know this token. Create one at {tokens} and set HF_TOKEN, or unset it: models "
                "that are not gated need none."
            )
        case _ if error.response.status_code == 403:
            return GatedModelError(
                f"The hub forbids this token to read {hub_id}. Give it that permission at {tokens}, or ask for access "
                f"at {page}."
            )
    return WeightsError(sentence) if sentence else None


def why_full(error: BaseException | None) -> str | None:
    """Return why nothing more could be written, None when that was not the reason."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return _FULL[error.errno]
        if isinstance(error, RuntimeError):  # Xet's errors carry a text alone
            for number, why in _FULL.items():
                if os.strerror(number).lower() in str(error).lower():
                    return why
        error = error.__cause__
    return None


def _gated(hub_id: str, page: str, *, has_token: bool) -> str:
    if has_token:
        return f"{hub_id} is gated and this token has no access. Accept its licence at {page} with the token's account."
    return (
        f"{hub_id} is gated and no token is here. Accept its licence at {page}, then set HF_TOKEN (locally) or "
        "create the secret and deploy again: modal secret create huggingface HF_TOKEN=<token>."
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
