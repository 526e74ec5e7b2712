"""Volumes of the plane: after which calls a container sees a file, open files, and limited capacity."""

from __future__ import annotations

import modal
import pytest

from .modal import ModalPlane, TaskState
from .sample import BOOT_S, deploy, events, get, live, server


@pytest.mark.parametrize("action", ["reload", "commit"])
def test_volume_with_an_open_file_is_not_reloaded(client: modal.Client, action: str) -> None:
    """A reload fails with Modal's message while a file of the volume is open; a commit reloads too."""
    answer = server(client)(model="holds").hold_file_and.remote(action)
    assert "there are open files preventing the operation" in answer


def test_volume_commit_beyond_its_capacity_fails(plane: ModalPlane) -> None:
    """A commit beyond the capacity fails, and with it the hook."""
    plane.volumes.put("sample-cache").capacity_bytes = 3
    deploy(plane)
    status, body = get(f"{plane.url_of('sample', 'Server', 'serve')}/health?model=full")
    assert status == 500
    assert b"is full" in body
    assert plane.volumes["sample-cache"].files() == []


def test_volume_beyond_its_capacity_has_no_space(plane: ModalPlane) -> None:
    """A write beyond the capacity fails with ENOSPC; the bytes that fit are kept and committed."""
    plane.volumes.put("sample-cache", {"seed.txt": b"seed"}).capacity_bytes = 65536
    deploy(plane)
    url = f"{plane.url_of('sample', 'Server', 'serve')}/health"
    status, body = get(f"{url}?model=writes-much")
    assert (status, b"No space left on device" in body) == (500, True)
    plane.wait_until(lambda: plane.tasks[0].state is TaskState.DEAD, BOOT_S, "the commit of half a file at the exit")
    plane.volumes["sample-cache"].remove("much.bin")
    assert get(f"{url}?model=writes-little")[0] == 200
    assert plane.volumes["sample-cache"].files() == ["seed.txt", "writes-little.txt"]


def test_volume_content_is_seen_elsewhere_once_committed(shared: ModalPlane) -> None:
    """The next container sees what the sample's hook committed to the volume."""
    url = shared.url_of("sample", "Server", "serve")
    get(f"{url}/health?model=writer")
    assert shared.volumes["sample-cache"].read("writer.txt") == b"prepared"
    get(f"{url}/health?model=reader")
    assert "writer.txt" in next(e for e in events(shared, "reader") if e["event"] == "start")["files"]


def test_volume_file_reaches_a_live_container_by_commit_and_reload(shared: ModalPlane, client: modal.Client) -> None:
    """A file is on the volume once it is committed; another container sees it once that container reloads."""
    here, there = server(client)(model="writer"), server(client)(model="reader")
    assert there.read.remote("late.txt") is None
    alive = live(shared, "reader")
    here.write.remote("late.txt", "late")
    there.reload.remote()
    assert (there.read.remote("late.txt"), "late.txt" in shared.volumes["sample-cache"].files()) == (None, False)
    here.commit.remote()
    assert (there.read.remote("late.txt"), shared.volumes["sample-cache"].read("late.txt")) == (None, b"late")
    there.reload.remote()
    assert there.read.remote("late.txt") == "late"
    assert live(shared, "reader") == alive
