"""The fake hub's own tests: it answers as the hub does, and remembers what it does not know."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import requests

from .hub import Hub, Repository, serving

COMMIT = "a" * 40


@pytest.fixture
def running() -> Iterator[Hub]:
    """Run a hub with one open and one gated repository."""
    hub = Hub(repositories={"o/open": Repository(COMMIT, {"x": b"123"}), "o/shut": Repository(COMMIT, {}, "all")})
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
    """The client tells errors apart by this header."""
    answer = requests.get(running.url + path, timeout=5)

    assert (answer.status_code, answer.headers.get("X-Error-Code")) == (status, code)
    assert running.asked == [f"GET {path}"]
    assert running.unknown == []


def test_fake_hub_opens_a_gated_repository_to_its_token(running: Hub) -> None:
    """Only to that one."""
    url = running.url + "/api/models/o/shut/tree/main"

    assert requests.get(url, headers={"Authorization": f"Bearer {running.token}"}, timeout=5).status_code == 200
    assert requests.get(url, headers={"Authorization": "Bearer hf_wrong"}, timeout=5).status_code == 401


def test_fake_hub_remembers_what_it_does_not_know(running: Hub) -> None:
    """The fixture fails the test then: the client has learned a new way."""
    assert requests.get(running.url + "/api/new?x=1", timeout=5).status_code == 404
    assert running.unknown == ["/api/new?x=1"]
