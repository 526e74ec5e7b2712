"""What the hub is asked, through its own client, and what is said when it does not answer or refuses.

The client leaves sockets and threads behind: a download happens in a child (`download_process`). Its own retries are
kept; added here are time limits where it has none, and a bound on how long a rate limit is waited out.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from service.errors import ServiceError, WeightsError
from service.weights.files import Wanted
from service.weights.huggingface_errors import ADVICE, endpoint, explained, why_full
from service.weights.manifest import File, Marker

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")
REACH_TIMEOUT_S = 3.0
ANSWER_TIMEOUT_S = 30.0
LONGEST_WAIT_S = 120  # of one rate limit; a whole five-minute window of the hub's is somebody else's to wait
WAITS_S = (1.0, 2.0, 4.0, 8.0)  # between attempts that brought nothing, on top of the client's own


def in_reach() -> bool:
    """Tell whether the hub answers within a few seconds."""
    import requests  # noqa: PLC0415 - 90 ms that only this question costs

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:  # as huggingface_hub reads it
        return False
    try:
        requests.head(endpoint(), timeout=REACH_TIMEOUT_S, allow_redirects=False)
    except requests.RequestException:
        return False
    return True


def plan(wanted: Wanted, token: str | None, say: Callable[[str], None] = lambda _: None) -> Marker:
    """Ask, with patience, for the commit and the list of files with their checksums; nothing is verified yet.

    Raises:
        WeightsError: The hub is not in reach.
        Exception: The client's own; `explained` turns them into sentences.
    """
    if not in_reach():  # the client would try again for half a minute
        raise WeightsError(f"{wanted.at} cannot be fetched from {endpoint()}: it is not in reach. {ADVICE}")
    return patiently(lambda: _listing(wanted, token, say))


def _listing(wanted: Wanted, token: str | None, say: Callable[[str], None]) -> Marker:
    from huggingface_hub import HfApi  # noqa: PLC0415 - only hub models need it
    from huggingface_hub.hf_api import RepoFile  # noqa: PLC0415

    api = HfApi(endpoint=endpoint(), token=token)
    info = api.model_info(wanted.hub_id, revision=wanted.revision, timeout=ANSWER_TIMEOUT_S)
    revision = info.sha or wanted.revision
    if revision is None:
        raise WeightsError(f"{endpoint()} does not tell the commit of {wanted.hub_id}. {ADVICE}")
    if info.id != wanted.hub_id:
        say(f"{wanted.hub_id} is now called {info.id} on the hub. Write the new name into the entry's hub_id.")
    entries = api.list_repo_tree(wanted.hub_id, recursive=True, revision=revision)
    files = {entry.path: _file(entry) for entry in entries if isinstance(entry, RepoFile)}
    return Marker(wanted.hub_id, revision, files)


def _file(entry: object) -> File:
    lfs = getattr(entry, "lfs", None)
    if lfs is not None:
        return File(lfs.size, f"sha256:{lfs.sha256}")
    return File(entry.size, f"git:{entry.blob_id}")  # type: ignore[attr-defined]


def resolve(hub_id: str, token: str | None = None) -> str:
    """Return the commit that the newest revision is now.

    Raises:
        WeightsError: The hub cannot be reached, or has no such repository.
    """
    from huggingface_hub import HfApi, close_session  # noqa: PLC0415 - only hub models need it

    def ask() -> str:
        return str(HfApi(endpoint=endpoint(), token=token).model_info(hub_id, timeout=ANSWER_TIMEOUT_S).sha)

    wanted = Wanted(hub_id)
    with explained(wanted, token), connected():
        try:
            return patiently(ask)
        finally:
            close_session()


@contextmanager
def connected(say: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Have the client give up in time while the block lasts: it has no time-out of its own for lists of files."""
    from huggingface_hub import set_client_factory  # noqa: PLC0415 - only hub models need it
    from huggingface_hub.utils._http import default_client_factory  # noqa: PLC0415

    limit = _RateLimit(say)

    def client() -> httpx2.Client:
        made = default_client_factory()
        made.event_hooks = {
            "request": [*made.event_hooks["request"], _bound],
            "response": [*made.event_hooks["response"], limit.look],
        }
        return made

    set_client_factory(client)
    try:
        yield
    finally:
        set_client_factory(default_client_factory)


def _bound(request: httpx2.Request) -> None:
    limits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        name: ANSWER_TIMEOUT_S if limits.get(name) is None else limits[name]
        for name in ("connect", "read", "write", "pool")
    }


class _RateLimit:
    """Says that the hub asks to wait, and refuses where that is too long. The client does the waiting."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._lock = threading.Lock()
        self._since: float | None = None

    def look(self, response: httpx2.Response) -> None:
        if response.status_code != 429:
            self._since = None
            return
        wait_s = retry_after_s(response) or 0
        with self._lock:
            now = time.monotonic()
            first, self._since = self._since is None, self._since or now
            if wait_s > LONGEST_WAIT_S or now - self._since > LONGEST_WAIT_S * 2:
                raise WeightsError(
                    f"{endpoint()} answers no more requests from here for {wait_s} s (429, its rate limit). Set "
                    "HF_TOKEN, which raises the limit, or start again later: finished files are kept."
                )
        if first:
            self._say(f"The hub limits the rate of requests; waiting {wait_s} s. A token (HF_TOKEN) raises the limit.")


def retry_after_s(response: httpx2.Response) -> int | None:
    """Return how long a refused client is to wait, by either of the headers that the hub sends."""
    from huggingface_hub.utils._http import parse_ratelimit_headers  # noqa: PLC0415 - only hub models need it

    limit = parse_ratelimit_headers(response.headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds
    given = response.headers.get("Retry-After", "").strip()
    return int(given) if given.isdecimal() else None


def patiently(act: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
    """Do something again when it failed for a reason that passes: a cut connection, a time-out, an error of the hub's.

    Args:
        act: What to do.
        progress: A figure that grows with what was achieved; while it does, there are further attempts.
    """
    waits, before = list(WAITS_S), progress()
    while True:
        try:
            return act()
        except Exception as error:
            now = progress()
            if now > before:
                waits, before = list(WAITS_S), now
            if not waits or not _passes(error):
                raise
            time.sleep(max(waits.pop(0), _asked_to_wait_s(error)))


def _passes(error: BaseException | None) -> bool:
    import httpx2  # noqa: PLC0415 - the hub client's own
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415

    if isinstance(error, ServiceError) or why_full(error):
        return False
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in {408, 429} or error.response.status_code >= 500
    if isinstance(error, LocalEntryNotFoundError):  # the client could not get a file's metadata
        return error.__cause__ is None or _passes(error.__cause__)
    # RuntimeError is how Xet fails; OSError without a number, a body that was too short
    return isinstance(error, httpx2.TransportError | RuntimeError) or (
        isinstance(error, OSError) and error.errno is None
    )


def _asked_to_wait_s(error: BaseException) -> float:
    response = getattr(error, "response", None)
    return float(retry_after_s(response) or 0) if response is not None else 0.0
