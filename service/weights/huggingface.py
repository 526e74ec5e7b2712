"""The hub of Hugging Face, by its own client. Only this module and `huggingface_errors` import huggingface_hub.

The client reads HF_TOKEN, HF_ENDPOINT and its cache's place from the environment by itself. It leaves sockets and
threads behind, so a download happens in a child process (`download_process`). The client's own retries are kept; this
module adds timeouts where it has none, and a bound on how long a rate limit is waited out.
"""

from __future__ import annotations

import glob
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from service.errors import HubUnreachableError, ServiceError, WeightsError
from service.weights import hub_cache
from service.weights.disk_errors import disk_full_reason
from service.weights.files import RepositorySpec
from service.weights.huggingface_errors import endpoint, translate_errors
from service.weights.manifest import File, Manifest
from service.weights.reach import CHECK_CONNECTION, Unreachable, why_unreachable

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub.hf_api import RepoFile

_log = logging.getLogger(__name__)
T = TypeVar("T")
ANSWER_TIMEOUT_S = 30.0
MAX_RATE_LIMIT_S = 120  # of one rate limit; the hub's whole window of five minutes is too long for a boot to wait
# The client reads files in pieces of 10 MB, of which each of its 8 threads keeps several. Measured on 2 cores with this
# size: 365 MB became 98 MB, and a fifth of the time went with them (bench/weights.py).
READ_BYTES = 1 << 18
WAITS_S = (1.0, 2.0, 4.0, 8.0)  # between attempts without progress, in addition to the client's own


class HuggingFace:
    """`service.weights.hub.Hub` for huggingface.co, or the hub that HF_ENDPOINT names."""

    @property
    def url(self) -> str:
        """The hub's address."""
        return endpoint()

    def why_unreachable(self) -> Unreachable | None:
        """Return why the hub does not answer within a few seconds; None when it does."""
        return why_unreachable(endpoint())

    def resolve(self, hub_id: str) -> str:
        """Return the commit of the newest revision."""
        from huggingface_hub import HfApi  # noqa: PLC0415 - only hub models need it

        with translate_errors(RepositorySpec(hub_id)), configured_client():
            return str(retry(lambda: HfApi(endpoint=endpoint()).model_info(hub_id, timeout=ANSWER_TIMEOUT_S).sha))

    def list_files(self, repository: RepositorySpec) -> Manifest:
        """Return a revision's commit and files."""
        if unreachable := self.why_unreachable():  # the client would try again for half a minute
            raise HubUnreachableError(
                f"{repository.label} cannot be fetched from {endpoint()}, which is not in reach: {unreachable.reason}.",
                hint=unreachable.hint,
            )
        with translate_errors(repository), configured_client():
            return retry(lambda: _list_files(repository))

    def download(
        self, repository: RepositorySpec, revision: str, paths: Sequence[str], received_bytes: Callable[[], int]
    ) -> None:
        """Have the client download into the cache, with further attempts while bytes arrive."""
        from huggingface_hub import constants, snapshot_download  # noqa: PLC0415 - only hub models need it

        constants.DOWNLOAD_CHUNK_SIZE = READ_BYTES
        directory = hub_cache.snapshot(repository.hub_id, revision)

        def absent() -> list[str]:
            return [path for path in paths if not (directory / path).exists()]

        def attempt() -> None:
            snapshot_download(
                repository.hub_id,
                revision=revision,
                cache_dir=hub_cache.hub_cache(),
                endpoint=endpoint(),
                allow_patterns=[glob.escape(path) for path in absent()],
            )
            if missing := absent():  # during an outage the client returns whatever is in the cache
                raise OSError(f"{len(missing)} of {len(paths)} files have not come, such as {missing[0]}.")

        with translate_errors(repository), configured_client():
            retry(attempt, received_bytes)


def _list_files(repository: RepositorySpec) -> Manifest:
    from huggingface_hub import HfApi  # noqa: PLC0415 - only hub models need it
    from huggingface_hub.hf_api import RepoFile  # noqa: PLC0415

    api = HfApi(endpoint=endpoint())
    info = api.model_info(repository.hub_id, revision=repository.revision, timeout=ANSWER_TIMEOUT_S)
    revision = info.sha or repository.revision
    if revision is None:
        raise WeightsError(f"{endpoint()} does not tell the commit of {repository.hub_id}.", hint=CHECK_CONNECTION)
    if info.id != repository.hub_id:
        _log.warning(
            "%s is now called %s on the hub. Write the new name into the entry's hub_id.", repository.hub_id, info.id
        )
    entries = api.list_repo_tree(repository.hub_id, recursive=True, revision=revision)
    files = {entry.path: _file(entry) for entry in entries if isinstance(entry, RepoFile)}
    return Manifest(repository.hub_id, revision, files)


def _file(entry: RepoFile) -> File:
    if entry.lfs is not None:
        return File(entry.lfs.size, f"sha256:{entry.lfs.sha256}")
    return File(entry.size, f"git:{entry.blob_id}")


_client_lock = threading.Lock()
_client_users = 0


@contextmanager
def configured_client() -> Iterator[None]:
    """Give the client timeouts while the block lasts: it has none for lists of files. Threads share one client."""
    from huggingface_hub import close_session, set_client_factory  # noqa: PLC0415 - only hub models need it
    from huggingface_hub.utils._http import default_client_factory  # noqa: PLC0415

    global _client_users  # noqa: PLW0603 - the client's factory is global too
    limit = _RateLimit()

    def client() -> httpx2.Client:
        made = default_client_factory()
        made.event_hooks = {
            "request": [*made.event_hooks["request"], _set_timeouts],
            "response": [*made.event_hooks["response"], limit.check],
        }
        return made

    with _client_lock:
        _client_users += 1
        if _client_users == 1:
            set_client_factory(client)
    try:
        yield
    finally:
        with _client_lock:
            _client_users -= 1
            if not _client_users:
                close_session()
                set_client_factory(default_client_factory)


def _set_timeouts(request: httpx2.Request) -> None:
    limits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        name: ANSWER_TIMEOUT_S if limits.get(name) is None else limits[name]
        for name in ("connect", "read", "write", "pool")
    }


class _RateLimit:
    """Logs that the hub limits the rate of requests, and refuses to wait too long. The client does the waiting."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: float | None = None

    def check(self, response: httpx2.Response) -> None:
        if response.status_code != 429:
            self._since = None
            return
        wait_s = retry_after_s(response) or 0
        with self._lock:
            now = time.monotonic()
            first, self._since = self._since is None, self._since or now
            if wait_s > MAX_RATE_LIMIT_S or now - self._since > MAX_RATE_LIMIT_S * 2:
                raise HubUnreachableError(
                    f"{endpoint()} answers no more requests from here for {wait_s} s (429, its rate limit).",
                    hint="Set HF_TOKEN, which raises the limit, or start again later: finished files are kept.",
                )
        if first:
            _log.warning(
                "The hub limits the rate of requests; waiting %d s. A token (HF_TOKEN) raises the limit.", wait_s
            )


def retry_after_s(response: httpx2.Response) -> int | None:
    """Return how long a refused client must wait, by either of the headers that the hub sends."""
    from huggingface_hub.utils._http import parse_ratelimit_headers  # noqa: PLC0415 - only hub models need it

    limit = parse_ratelimit_headers(response.headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds
    given = response.headers.get("Retry-After", "").strip()
    return int(given) if given.isdecimal() else None


def retry(act: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
    """Call something again while it fails for a passing reason: a cut connection, a timeout, an error of the hub.

    Args:
        act: What to call.
        progress: A figure that grows with what was achieved; while it grows, there are further attempts.
    """
    waits, before = list(WAITS_S), progress()
    while True:
        try:
            return act()
        except Exception as error:
            now = progress()
            if now > before:
                waits, before = list(WAITS_S), now
            if not waits or not _is_transient(error):
                raise
            time.sleep(max(waits.pop(0), _requested_wait_s(error)))


def _is_transient(error: BaseException | None) -> bool:
    import httpx2  # noqa: PLC0415 - the hub client's own
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415

    if isinstance(error, ServiceError) or disk_full_reason(error):
        return False
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in {408, 429} or error.response.status_code >= 500
    if isinstance(error, LocalEntryNotFoundError):  # the client could not get a file's metadata
        return error.__cause__ is None or _is_transient(error.__cause__)
    # RuntimeError is how Xet fails; OSError without a number, a body that was too short
    return isinstance(error, httpx2.TransportError | RuntimeError) or (
        isinstance(error, OSError) and error.errno is None
    )


def _requested_wait_s(error: BaseException) -> float:
    response = getattr(error, "response", None)
    return float(retry_after_s(response) or 0) if response is not None else 0.0


def delete(
    cache: Path,
    *,
    blobs: Iterable[Path],
    refs: Iterable[Path],
    repositories: Iterable[Path],
    snapshots: Iterable[Path],
    files: Iterable[Path],
) -> None:
    """Delete parts of the hub cache, in an order that keeps it consistent, and shared contents without a user."""
    from huggingface_hub import DeleteCacheStrategy  # noqa: PLC0415 - only a removal needs it

    DeleteCacheStrategy(
        expected_freed_size=0,  # for display only
        blobs=frozenset(blobs),
        refs=frozenset(refs),
        repos=frozenset(repositories),
        snapshots=frozenset(snapshots),
        files=frozenset(files),
        cache_dir=cache,
    ).execute()
