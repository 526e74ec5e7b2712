"""Which pins of the registry are behind the hub. Asks for commits only, of all repositories at once."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from service.errors import ServiceError, WeightsError
from service.registry.models import Registry
from service.weights import huggingface
from service.weights.files import Wanted
from service.weights.huggingface_errors import endpoint, explained

_AT_A_TIME = 8


@dataclass(frozen=True)
class Pin:
    """A repository of an entry, and what the hub says of it.

    Attributes:
        revision: The commit that is served; None: whatever is newest when it is first fetched.
        newest: The commit that the hub has; None where it does not tell.
        refusal: Why it does not tell.
    """

    model: str
    hub_id: str
    revision: str | None
    newest: str | None
    refusal: str | None = None

    @property
    def is_outdated(self) -> bool:
        """Whether the hub has another commit than the pinned one."""
        return bool(self.revision and self.newest and self.revision != self.newest)


def compare(registry: Registry, token: str | None) -> list[Pin]:
    """Return every repository of every entry with the commit that the hub has. Blocks for as long as the hub takes.

    Raises:
        WeightsError: The hub is not in reach.
    """
    if not huggingface.in_reach():
        raise WeightsError(
            f"{endpoint()} is not in reach, and only it knows the newest commits. Check the connection; HF_ENDPOINT "
            "names another hub."
        )
    pins = [(spec.key, hub_id, revision) for spec in registry.specs.values() for hub_id, revision in spec.repositories]
    newest = _newest({hub_id for _, hub_id, _ in pins}, token)
    return [Pin(key, hub_id, revision, *newest[hub_id]) for key, hub_id, revision in pins]


def _newest(hub_ids: Iterable[str], token: str | None) -> dict[str, tuple[str | None, str | None]]:
    """Return hub id -> commit, or why there is none."""
    from huggingface_hub import HfApi, close_session  # noqa: PLC0415 - only this question costs it

    api = HfApi(endpoint=endpoint(), token=token)

    def ask(hub_id: str) -> tuple[str | None, str | None]:
        try:
            with explained(Wanted(hub_id), token):
                return huggingface.patiently(
                    lambda: api.model_info(hub_id, timeout=huggingface.ANSWER_TIMEOUT_S).sha
                ), None
        except ServiceError as error:
            return None, str(error)

    found = sorted(hub_ids)
    with huggingface.connected(), ThreadPoolExecutor(_AT_A_TIME) as pool:
        try:
            return dict(zip(found, pool.map(ask, found), strict=True))
        finally:
            close_session()
