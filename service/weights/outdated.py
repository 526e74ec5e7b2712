"""Which pinned commits of the registry are older than the hub's. Requests commits only, 8 repositories at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from service.errors import HubUnreachableError, ServiceError
from service.registry.models import Registry
from service.weights.files import is_upload
from service.weights.hub import hub_for

_AT_A_TIME = 8


@dataclass(frozen=True)
class Pin:
    """A repository of an entry, and the hub's newest commit of it.

    Attributes:
        revision: The commit that is served; None: the newest at the time of its first fetch.
        newest: The hub's newest commit; None where the hub returned an error.
        refusal: That error.
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


def compare(registry: Registry) -> list[Pin]:
    """Return every repository of every entry with the hub's newest commit. Blocks for as long as the hub takes.

    Raises:
        WeightsError: The hub cannot be reached.
    """
    pins = [
        (spec.key, hub_id, revision)
        for spec in registry.specs.values()
        for hub_id, revision in spec.repositories
        if not is_upload(hub_id)
    ]
    hub_ids = sorted({hub_id for _, hub_id, _ in pins})
    for hub in {hub_for(hub_id) for hub_id in hub_ids}:
        if unreachable := hub.why_unreachable():
            raise HubUnreachableError(
                f"{hub.url} is not in reach, and only it knows the newest commits: {unreachable.reason}.",
                hint=unreachable.hint,
            )
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        newest = dict(zip(hub_ids, pool.map(_newest, hub_ids), strict=True))
    return [Pin(key, hub_id, revision, *newest[hub_id]) for key, hub_id, revision in pins]


def _newest(hub_id: str) -> tuple[str | None, str | None]:
    """Return the newest commit, or why there is none."""
    try:
        return hub_for(hub_id).resolve(hub_id), None
    except ServiceError as error:
        return None, str(error)
