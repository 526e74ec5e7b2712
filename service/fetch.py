"""From the hub into the cache, in a process of its own.

The hub's client downloads on threads that no interrupt ends, and leaves sockets and open files on a volume behind. A
child can be killed, and takes all that with it before a snapshot is taken. Run as `python -m service.fetch`: the
order comes as JSON on standard input, which stays open for as long as the parent lives; sentences and the result go out
as JSON lines; the client's progress bars go to standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from service import errors
from service.errors import GatedModelError, ServiceError, WeightsError
from service.hardware import check_room

HUB_TIMEOUT_S = 3.0
# The engine reads safetensors; the same weights in other formats would only cost time and room.
OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.msgpack", "*.h5", "*.ot", "onnx/*", "openvino/*")


@dataclass(frozen=True)
class Wanted:
    """One repository: which, at which commit (None: the newest), without which files."""

    hub_id: str
    revision: str | None = None
    ignore: tuple[str, ...] = ()


def hub_token(environ: Mapping[str, str]) -> str | None:
    """Return the hub's token; an empty variable is none."""
    return environ.get("HF_TOKEN", "").strip() or None


def in_child(wanted: Wanted, token: str | None, say: Callable[[str], None]) -> Path:
    """Do as `fetch` does, in a child that is killed when this process is interrupted or dies."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    if token:
        env["HF_TOKEN"] = token
    command = [sys.executable, "-m", "service.fetch"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=env, start_new_session=True, **pipes) as child:
        try:
            return _follow(child, wanted, say)
        except BaseException:
            child.send_signal(signal.SIGKILL)
            raise


def _follow(child: subprocess.Popen[str], wanted: Wanted, say: Callable[[str], None]) -> Path:
    assert child.stdin is not None  # noqa: S101 - in_child asked for pipes
    assert child.stdout is not None  # noqa: S101 - in_child asked for pipes
    with contextlib.suppress(BrokenPipeError):  # it died at once; below it gets its sentence
        child.stdin.write(json.dumps(asdict(wanted)) + "\n")
        child.stdin.flush()
    for line in child.stdout:
        word = json.loads(line)
        if "say" in word:
            say(word["say"])
        elif "error" in word:
            raise getattr(errors, word["error"])(word["sentence"])
        else:
            return Path(word["path"])
    raise WeightsError(
        f"The download of {wanted.hub_id} ended with code {child.wait()} and no reason; what it said stands above. "
        "Start again: finished files are kept."
    )


def main() -> None:
    """Fetch what standard input orders."""
    wanted = json.loads(sys.stdin.readline())
    threading.Thread(target=_die_with_parent, daemon=True).start()
    order = Wanted(wanted["hub_id"], wanted["revision"], tuple(wanted["ignore"]))
    try:
        path = fetch(order, hub_token(os.environ), _tell_say)
    except ServiceError as error:
        _tell({"error": type(error).__name__, "sentence": str(error)})
    else:
        _tell({"path": str(path)})
    sys.stdout.flush()
    os._exit(0)  # past the client's threads


def _die_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _tell_say(sentence: str) -> None:
    _tell({"say": sentence})


def _tell(word: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(word) + "\n")
    sys.stdout.flush()


def fetch(wanted: Wanted, token: str | None, say: Callable[[str], None]) -> Path:
    """Bring a repository's files into the cache, in this process, and return their directory.

    Raises:
        GatedModelError: The hub wants a token of somebody who accepted the model's licence.
        DiskSpaceError: The cache has too little room for what is missing.
        WeightsError: The hub cannot be reached, has no such repository or revision, or broke off.
    """
    import httpx2  # noqa: PLC0415 - the hub client's own, and only hub models need it
    from huggingface_hub import constants, get_token, snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub_id, revision, ignore = wanted.hub_id, wanted.revision, [*OTHER_FORMATS, *wanted.ignore]
    at = f" at revision {revision}" if revision else ""
    advice = "Check the connection; HF_ENDPOINT names another hub. The model 'tiny' needs none."
    if not hub_in_reach():  # the client would try again for half a minute
        raise WeightsError(f"{hub_id}{at} cannot be fetched from {_endpoint()}: it is not in reach. {advice}")
    try:
        missing = _missing_bytes(wanted, ignore, token)
        check_room(Path(constants.HF_HUB_CACHE), missing / 1e9, hub_id, "set HF_HOME to a directory on a larger disk")
        say(f"Fetching {hub_id}{at}: {missing / 1e9:.1f} GB")
        return Path(snapshot_download(hub_id, revision=revision, ignore_patterns=ignore, token=token))
    except GatedRepoError as error:
        raise GatedModelError(_gated(hub_id, bool(token or get_token()))) from error
    except RevisionNotFoundError as error:
        raise WeightsError(f"{hub_id} has no revision '{revision}'. Correct the entry's revision.") from error
    except RepositoryNotFoundError as error:
        raise WeightsError(
            f"The hub has no repository '{hub_id}', or it is private and the token has no access. "
            f"Look it up at {_endpoint()}/{hub_id}."
        ) from error
    except (
        HfHubHTTPError,
        httpx2.HTTPError,
        LocalEntryNotFoundError,
        HFValidationError,
        OSError,
        RuntimeError,
    ) as error:
        raise WeightsError(
            f"{hub_id}{at} cannot be fetched from {_endpoint()}: {_first_line(error)} {advice}"
        ) from error


def hub_in_reach() -> bool:
    """Tell whether the hub answers within a few seconds."""
    import requests  # noqa: PLC0415 - 90 ms that only this question costs

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:  # as huggingface_hub reads it
        return False
    try:
        requests.head(_endpoint(), timeout=HUB_TIMEOUT_S, allow_redirects=False)
    except requests.RequestException:
        return False
    return True


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def _missing_bytes(wanted: Wanted, ignore: list[str], token: str | None) -> int:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - only hub models need it
    from huggingface_hub.errors import DryRunError  # noqa: PLC0415
    from huggingface_hub.utils.tqdm import tqdm  # noqa: PLC0415

    class Silent(tqdm):
        """No bar for asking sizes."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

    try:
        plan = snapshot_download(
            wanted.hub_id,
            revision=wanted.revision,
            ignore_patterns=ignore,
            token=token,
            dry_run=True,
            tqdm_class=Silent,
        )
    except DryRunError as error:
        raise error.__cause__ or error from None  # what kept it from the repository says more
    return sum(file.file_size or 0 for file in plan if file.will_download)


def _gated(hub_id: str, has_token: bool) -> str:
    page = f"{_endpoint()}/{hub_id}"
    if has_token:
        return f"{hub_id} is gated and this token has no access. Accept its licence at {page} with the token's account."
    return (
        f"{hub_id} is gated and no token is here. Accept its licence at {page}, then set HF_TOKEN (locally) or "
        "create the secret: modal secret create huggingface HF_TOKEN=<token>."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    main()
