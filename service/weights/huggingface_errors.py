"""Errors of huggingface_hub in words: what happened, and what to do next."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from service.errors import GatedModelError, HubUnreachableError, ServiceError, WeightsError
from service.weights.disk_errors import disk_full_reason, disk_space_error
from service.weights.files import RepositorySpec
from service.weights.reach import CHECK_CONNECTION

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError


def endpoint() -> str:
    """Return the hub's address."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


@contextmanager
def translate_errors(repository: RepositorySpec) -> Iterator[None]:
    """Turn what huggingface_hub raises into an error with the next step.

    Raises:
        GatedModelError: The hub wants a token of an account that accepted the model's licence.
        DiskSpaceError: The disk or the volume is full.
        WeightsError: The hub refuses; as `HubUnreachableError`: anything else.
    """
    try:
        yield
    except ServiceError:
        raise
    except Exception as error:
        raise _translated(repository, error) from error


def _translated(repository: RepositorySpec, error: Exception) -> ServiceError:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415 - only hub models need it

    if reason := disk_full_reason(error):
        return disk_space_error(repository, reason)
    for cause in (error, error.__cause__):
        if isinstance(cause, HfHubHTTPError) and (refused := _refused(repository, cause)):
            return refused
    why = _first_line(error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error)
    return HubUnreachableError(f"{repository.label} cannot be fetched from {endpoint()}: {why}", hint=CHECK_CONNECTION)


def _refused(repository: RepositorySpec, error: HfHubHTTPError) -> WeightsError | None:
    from huggingface_hub import errors  # noqa: PLC0415 - only hub models need it

    hub_id, page, tokens = repository.hub_id, f"{endpoint()}/{repository.hub_id}", f"{endpoint()}/settings/tokens"
    kind: type[WeightsError] = WeightsError
    match error:
        case errors.GatedRepoError():
            return _gated(hub_id, page)
        case errors.RevisionNotFoundError():
            message, hint = f"{hub_id} has no revision '{repository.revision}'.", "Correct the entry's revision."
        case errors.DisabledRepoError():
            message, hint = f"The hub has disabled {hub_id}.", f"Look up why at {page}, or choose another model."
        case errors.RepositoryNotFoundError():
            message = f"The hub has no repository '{hub_id}' (any more), or it is private and the token has no access."
            hint = f"Look it up at {page}."
        case _ if error.response.status_code == 401:
            message = f"{endpoint()} does not know this token."
            hint = f"Create one at {tokens} and set HF_TOKEN, or unset it: models that are not gated need none."
        case _ if error.response.status_code == 403:
            kind, message = GatedModelError, f"The hub forbids this token to read {hub_id}."
            hint = f"Give it that permission at {tokens}, or ask for access at {page}."
        case _:
            return None
    return kind(message, hint=hint)


def _gated(hub_id: str, page: str) -> GatedModelError:
    from huggingface_hub import get_token  # noqa: PLC0415 - only hub models need it

    if get_token():
        return GatedModelError(
            f"{hub_id} is gated and this token has no access.",
            hint=f"Accept its licence at {page} with the token's account.",
        )
    return GatedModelError(
        f"{hub_id} is gated and no token is here.",
        hint=f"Accept its licence at {page}, then set HF_TOKEN (locally) or create the secret and deploy again: "
        "modal secret create huggingface HF_TOKEN=<token>.",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
