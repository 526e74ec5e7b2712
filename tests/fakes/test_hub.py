"""The fake hub answers as the hub does, and keeps requests that it does not know."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
import requests

from .hub import Fault, Hub, Repository, serving

COMMIT = "a" * 40


@pytest.fixture
def running() -> Iterator[Hub]:
    """Run a hub with one open and one gated repository."""
    files = {"x": b"123", "y/large": b"456789"}
    opened = Repository(COMMIT, files, large=("*large",))
    hub = Hub(repositories={"o/open": opened, "o/shut": Repository(COMMIT, {}, "all")})
    with serving(hub):
        yield hub


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/api/models/o/open/tree/main", 200, None),
        (f"/api/models/o/open/tree/{COMMIT}", 200, None),
        ("/api/models/o/open/revision/main", 200, None),
        ("/o/open/resolve/main/x", 200, None),
        ("/api/models/o/open/tree/other", 404, "RevisionNotFound"),
        ("/api/models/o/gone/tree/main", 401, "RepoNotFound"),
        ("/api/models/o/shut/tree/main", 401, "GatedRepo"),
    ],
)
def test_fake_hub_answers_with_the_hubs_own_codes(running: Hub, path: str, status: int, code: str | None) -> None:
    """The client distinguishes errors by this header."""
    answer = requests.get(running.url + path, timeout=5)

    assert (answer.status_code, answer.headers.get("X-Error-Code")) == (status, code)
    assert running.requests == [f"GET {path}"]
    assert running.unknown == []


def test_fake_hub_serves_a_gated_repository_to_its_token_only(running: Hub) -> None:
    """Without it the answer is 401."""
    url = running.url + "/api/models/o/shut/tree/main"

    assert requests.get(url, headers={"Authorization": f"Bearer {running.token}"}, timeout=5).status_code == 200
    assert requests.get(url, headers={"Authorization": "Bearer hf_wrong"}, timeout=5).status_code == 401


def test_fake_hub_keeps_unknown_requests(running: Hub) -> None:
    """The fixture then fails the test: a new version of the client makes a new request."""
    assert requests.get(running.url + "/api/new?x=1", timeout=5).status_code == 404
    assert running.unknown == ["/api/new?x=1"]


def test_fake_hub_distinguishes_an_unauthorized_token_from_an_invalid_one(running: Hub) -> None:
    """403 for an account that accepted no licence; 401 for an invalid token, even where none is needed."""
    for path, token, status in (
        ("o/shut", "hf_unlicensed", 403),
        ("o/open", "hf_unlicensed", 200),
        ("o/open", "hf_wrong", 401),
    ):
        url = f"{running.url}/api/models/{path}/tree/main"
        assert requests.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=5).status_code == status


def test_fake_hub_lists_checksums_page_by_page(running: Hub) -> None:
    """Git's checksum of a small file, SHA-256 of a large one; a header has the next page."""
    running.page = 1
    first = requests.get(f"{running.url}/api/models/o/open/tree/{COMMIT}?recursive=True", timeout=5)
    second = requests.get(first.links["next"]["url"], timeout=5)

    rows = [row for row in first.json() + second.json() if row["type"] == "file"]
    assert rows[0] == {"type": "file", "path": "x", "size": 3, "oid": hashlib.sha1(b"blob 3\x00123").hexdigest()}  # noqa: S324
    assert rows[1]["lfs"]["oid"] == hashlib.sha256(b"456789").hexdigest()
    assert "next" not in second.links
    answer = requests.post(f"{running.url}/api/models/o/open/paths-info/main", json={"paths": ["x", "z"]}, timeout=5)
    assert answer.json() == rows[:1]


def test_fake_hub_sends_large_files_from_its_cdn(running: Hub) -> None:
    """The redirect has size and checksum; ranges are honoured; a token must not be sent there."""
    url = f"{running.url}/o/open/resolve/main/y/large"
    head = requests.head(url, timeout=5)
    assert (head.status_code, head.headers["X-Linked-Size"], head.headers["X-Repo-Commit"]) == (302, "6", COMMIT)
    cdn = head.headers["Location"]
    assert cdn.startswith(running.cdn_url)
    part = requests.get(cdn, headers={"Range": "bytes=2-"}, timeout=5)

    assert (part.status_code, part.content, part.headers["Content-Range"]) == (206, b"6789", "bytes 2-5/6")
    assert requests.get(cdn, headers={"Range": "bytes=6-"}, timeout=5).status_code == 416
    assert running.unknown == []
    requests.get(cdn, headers={"Authorization": "Bearer hf_right"}, timeout=5)
    assert len(running.unknown) == 1


def test_fake_hub_redirects_from_an_old_name(running: Hub) -> None:
    """As the hub does for a while."""
    running.renamed["o/old"] = "o/open"
    answer = requests.get(running.url + "/api/models/o/old/revision/main", timeout=5)

    assert (answer.history[0].status_code, answer.json()["id"]) == (307, "o/open")


def test_fake_hub_applies_a_fault_as_often_as_it_says(running: Hub) -> None:
    """A status, a cut connection, other content; later requests succeed."""
    url = running.url + "/o/open/resolve/main/x"
    running.faults += [Fault("/x", 1, 503), Fault("/x", 1, cut_after=1), Fault("/x", 1, content=b"abc")]

    assert requests.get(url, timeout=5).status_code == 503
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        requests.get(url, timeout=5)
    assert [requests.get(url, timeout=5).content for _ in range(2)] == [b"abc", b"123"]
    assert running.downloads() == ["x"] * 4


def test_fake_hub_stops_after_the_given_byte(running: Hub) -> None:
    """There a test can kill the client."""
    running.stop_after(2)
    with requests.get(running.url + "/o/open/resolve/main/x", timeout=5, stream=True) as answer:
        assert answer.raw.read(2) == b"12"
        assert running.stopped.wait(5)
        running.resume()
        assert answer.raw.read() == b"3"
