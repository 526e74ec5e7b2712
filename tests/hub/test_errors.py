"""Every failure has a message and a next step and leaves no partial model; passing faults are retried."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from huggingface_hub import constants

from service.errors import DiskSpaceError, GatedModelError, HubUnreachableError, ServiceError, WeightsError
from service.weights import download, download_process, huggingface_errors, store
from service.weights.files import RepositorySpec
from tests.fakes.hub import Fault, Hub
from tests.unit.hub_client import slept  # noqa: F401 - a fixture

from .conftest import COMMIT, READ, SHARDS, SPEC, contents
from .processes import python

pytestmark = pytest.mark.usefixtures("slept", "here")
SHARD = "model-00003-of-00004.safetensors"
SOON_S = 20


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetch in this process, whose clock the test has."""
    monkeypatch.setattr(download_process, "download_in_child", download.download)


def refused(kind: type[ServiceError], spec: Any = SPEC) -> str:
    """Fetch, and return the message of the error; it has one line, no token, and no model is served then."""
    token = os.environ.get("HF_TOKEN")
    with pytest.raises(kind) as caught:
        store.ensure(spec)
    assert type(caught.value) is kind
    assert store.find(spec) is None
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert not token or token not in sentence
    return sentence


@pytest.mark.parametrize("gated", ["files", "all"])
def test_gated_model_without_a_token_names_page_and_token(hub: Hub, gated: Any) -> None:
    """The hint: accept the licence there, then set the token."""
    hub.repositories["org/mine"].gated = gated
    sentence = refused(GatedModelError)

    assert f"no token is here. Accept its licence at {hub.url}/org/mine" in sentence
    assert "HF_TOKEN" in sentence


@pytest.mark.parametrize("gated", ["files", "all"])
def test_gated_model_with_an_unauthorized_token_names_the_account(
    hub: Hub, gated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token is not enough: its account must have accepted the licence."""
    hub.repositories["org/mine"].gated = gated

    monkeypatch.setenv("HF_TOKEN", "hf_unlicensed")

    assert "this token has no access. Accept its licence" in refused(GatedModelError)


def test_gated_model_with_access_is_fetched(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token goes to the hub and not to the CDN, which the fake checks."""
    hub.repositories["org/mine"].gated = "all"

    monkeypatch.setenv("HF_TOKEN", hub.token)

    assert contents(store.ensure(SPEC).model) == READ


def test_token_that_the_hub_does_not_know_is_named_as_the_cause(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been revoked, or mistyped."""
    monkeypatch.setenv("HF_TOKEN", "hf_revoked")

    assert "does not know this token. Create one at" in refused(WeightsError)


def test_token_without_the_permission_is_named_as_the_cause(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fine-grained token that may not read this repository."""
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.faults.append(Fault("/api/models", -1, 403, {"X-Error-Message": "not allowed"}))

    assert "forbids this token to read org/mine" in refused(GatedModelError)


def test_repository_that_is_gone_is_named_with_its_page(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deleted, or moved with no redirect left behind."""
    monkeypatch.setenv("HF_TOKEN", hub.token)
    del hub.repositories["org/mine"]

    sentence = refused(WeightsError)

    assert "no repository 'org/mine' (any more)" in sentence
    assert f"Look it up at {hub.url}/org/mine" in sentence


def test_repository_that_is_disabled_says_so(hub: Hub) -> None:
    """The hub answers with a message and no code."""
    hub.faults.append(Fault("/api/models", -1, 403, {"X-Error-Message": "Access to this resource is disabled."}))

    assert "The hub has disabled org/mine" in refused(WeightsError)


def test_revision_that_is_gone_is_named(hub: Hub) -> None:
    """The history may have been rewritten, or the pin mistyped."""
    hub.repositories["org/mine"].commit = "e" * 40

    assert f"org/mine has no revision '{COMMIT}'" in refused(WeightsError)


def test_unreachable_hub_without_complete_weights_is_named_soon(hub: Hub, slept: list[float]) -> None:  # noqa: F811
    """No server listens there, so it is not retried."""
    hub_refusals_url = "http://127.0.0.1:9"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub_refusals_url)
        assert f"cannot be fetched from {hub_refusals_url}, which is not in reach: " in refused(HubUnreachableError)
    assert slept == []


def test_unreachable_hub_with_complete_weights_does_not_matter(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """No request is made, so none fails."""
    first = store.ensure(SPEC)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")

    assert store.ensure(SPEC) == store.Weights(first.model)


def test_wrong_content_under_the_right_size_is_fetched_again(hub: Hub) -> None:
    """The checksum finds what a broken proxy may do once; the second download is right."""
    hub.faults.append(Fault(f"GET cdn:.*{SHARD}", content=bytes(len(SHARDS[SHARD]))))

    assert contents(store.ensure(SPEC).model) == READ
    assert len(hub.downloads(SHARD)) == 2


def test_wrong_content_twice_is_refused(hub: Hub) -> None:
    """It names the file; the other files are kept and not fetched again."""
    hub.faults.append(Fault(f"GET cdn:.*{SHARD}", -1, content=bytes(len(SHARDS[SHARD]))))
    sentence = refused(WeightsError)

    assert f"{SHARD} of org/mine at revision {COMMIT} is damaged" in sentence
    assert "the other files are kept" in sentence
    hub.faults.clear()
    hub.requests.clear()
    assert contents(store.ensure(SPEC).model) == READ
    assert len(hub.downloads()) == 1


@pytest.mark.parametrize("path", [SHARD, "tokenizer.json", "config.json"])
@pytest.mark.parametrize("size", [10, len(SHARDS[SHARD])])
def test_file_that_changes_under_the_download_is_refused(hub: Hub, path: str, size: int) -> None:
    """The content is consistent in itself, but not what the hub listed for this commit."""
    hub.repositories["org/mine"].changed[path] = bytes(size)

    assert f"{path} of org/mine at revision {COMMIT}" in refused(WeightsError)


def test_rate_limit_is_waited_out(
    hub: Hub,
    slept: list[float],  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As long as the hub asks for, once for a list and once for a file; it is logged."""
    hub.faults += [
        Fault("GET /api/models/org/mine/revision", 1, 429, {"Retry-After": "7"}),
        Fault("GET /api/models/org/mine/tree", 2, 429, {"RateLimit": '"api";r=0;t=9'}),
        Fault("HEAD .*config.json", 1, 429, {"Retry-After": "5"}),
        Fault(f"GET cdn:.*{SHARD}", 1, 429, {"Retry-After": "6"}),
    ]
    assert contents(store.ensure(SPEC).model) == READ
    assert {7, 10} <= set(slept)  # the client adds one
    assert "waiting 7 s. A token (HF_TOKEN) raises the limit" in caplog.text


def test_rate_limit_of_an_hour_is_not_waited_out(hub: Hub, slept: list[float]) -> None:  # noqa: F811
    """A boot that waits for an hour is worse than one that fails."""
    hub.faults.append(Fault("HEAD .*/resolve/", -1, 429, {"Retry-After": "3600"}))

    assert "answers no more requests from here for 3600 s (429, its rate limit). Set HF_TOKEN" in refused(
        HubUnreachableError
    )
    assert sum(slept) < 10


@pytest.mark.parametrize("where", ["GET /api/models/org/mine/rev", "/tree/", "HEAD .*json", "GET cdn:", "GET .*/res"])
def test_burst_of_server_errors_is_waited_out(hub: Hub, where: str) -> None:
    """Three in a row at every kind of request."""
    hub.faults.append(Fault(where, 3, 503))

    assert contents(store.ensure(SPEC).model) == READ


@pytest.mark.parametrize("where", ["/api/models", "HEAD .*json", "GET cdn:"])
def test_server_errors_without_end_are_refused(hub: Hub, where: str, slept: list[float]) -> None:  # noqa: F811
    """With the hub's address and its answer, after a bounded number of attempts."""
    hub.faults.append(Fault(where, -1, 502))
    sentence = refused(HubUnreachableError)

    assert f"cannot be fetched from {hub.url}" in sentence
    assert "502" in sentence
    assert sum(slept) < 900


def test_cut_connections_are_resumed(hub: Hub) -> None:
    """A few times after some bytes: the rest is requested by Range, not the whole file again."""
    hub.faults += [Fault("GET cdn:", 6, cut_after=50_000), Fault("GET .*config.json", 1, cut_after=3)]

    assert contents(store.ensure(SPEC).model) == READ
    assert hub.served < sum(map(len, READ.values())) * 1.5


def test_slow_connection_is_a_slow_download(hub: Hub) -> None:
    """As long as bytes arrive, it continues."""
    hub.faults.append(Fault(f"GET cdn:.*{SHARD}", bytes_per_s=400_000))

    assert contents(store.ensure(SPEC).model) == READ


def test_connection_without_an_answer_times_out_and_is_retried(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the client's timeouts, and by ours for the list of files, where it has none."""
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr("service.weights.huggingface.ANSWER_TIMEOUT_S", 0.3)
    hub.faults += [Fault(f"GET cdn:.*{SHARD}", stalls=True), Fault("/tree/", stalls=True), Fault("/rev", stalls=True)]

    assert contents(store.ensure(SPEC).model) == READ


def test_repository_without_a_model_says_so(hub: Hub) -> None:
    """It has no file that the engine reads."""
    hub.repositories["org/mine"].files = {"README.md": b"#", "model.gguf": b"1"}

    assert "has no file that the engine reads" in refused(WeightsError)


def test_disk_that_fills_up_is_named_and_what_was_finished_is_kept(hub: Hub, tmp_path: Path) -> None:
    """On a real file system of two megabytes, which another program fills during the download."""
    hub.stop_after(600_000)
    program = """
        import os, subprocess, threading
        from pathlib import Path
        home, filler = Path(os.environ["HF_HOME"]), Path(os.environ["HF_HOME"]) / "filler"
        home.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(home)], check=True)
        def fill():
            sys.stdin.readline()
            try:
                filler.write_bytes(bytes(3_000_000))
            except OSError:
                print("filled", flush=True)
        threading.Thread(target=fill).start()
        try:
            weights.ensure(spec)
        except ServiceError as error:
            print(type(error).__name__, error, flush=True)
        assert weights.find(spec) is None
        assert not list(home.rglob("*.incomplete"))
        filler.unlink()
        kept = [path.name for path in home.rglob("snapshots/*/*")]
        print(*kept, flush=True)
        print(weights.ensure(spec).fetched)
        """
    process = python(dedent(program), before=["unshare", "-rm"])
    assert process.stdout is not None
    assert process.stdin is not None
    assert hub.stopped.wait(SOON_S)
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "filled\n"
    hub.resume()
    refusal, kept, fetched = process.communicate(timeout=SOON_S)[0].splitlines()

    assert refusal.startswith("DiskSpaceError ")
    assert "is full (0.0 GB free) and org/mine" in refusal
    assert "Finished files are kept" in refusal
    assert fetched == "True"
    assert not [name for name in kept.split() if len(hub.downloads(name)) > 1]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(122, "Disk quota exceeded"), "has used up its quota"),
        (OSError(28, "No space left on device"), "is full"),
        (RuntimeError("Xet: I/O error: No space left on device (os error 28)"), "is full"),
    ],
)
def test_full_disk_is_named_in_each_of_its_forms(hub: Hub, cache: Path, error: Exception, words: str) -> None:
    """A quota and a full disk differ only in the error number; Xet's errors have text only."""
    cache.mkdir(parents=True)
    with (
        pytest.raises(DiskSpaceError, match=words),
        huggingface_errors.translate_errors(RepositorySpec("org/mine", COMMIT)),
    ):
        raise error


def test_file_larger_than_allowed_is_named(hub: Hub) -> None:
    """A real limit of the kernel on file sizes."""
    program = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, 250_000))
try:
    weights.ensure(spec)
except ServiceError as error:
    print(type(error).__name__, error)
assert weights.find(spec) is None
"""
    said = python(program).communicate(timeout=SOON_S)[0]

    assert said.startswith("DiskSpaceError ")
    assert "does not accept a file of this size" in said


def test_mount_namespaces_work_on_this_machine() -> None:
    """The test of the full disk mounts a file system in a namespace of its own."""
    assert subprocess.run(["unshare", "-rm", sys.executable, "-c", ""], check=False).returncode == 0
