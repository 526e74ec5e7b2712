"""Checkpoints and restores of the plane: what a restore changes, and restores that fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from .modal import ModalPlane, TaskState
from .sample import command, deploy, events, get, names


def test_deployed_container_is_checkpointed_and_restored(plane: ModalPlane) -> None:
    """After a restore task id, socket, environment, GPUs and time differ from those that the hooks before it saw."""
    plane.snapshots.environment = {"LATE": "yes"}
    plane.snapshots.freeze_s = 0.5
    thawed: list[float] = []
    plane.snapshots.before_restore.append(lambda _task: thawed.append(time.time()))
    deploy(plane)
    assert get(f"{plane.url_of('sample', 'Server', 'serve')}/health?model=s&n_gpu=2&fast_boot=false")[0] == 200
    prepare, start, serve = events(plane, "s")
    assert (prepare["model"], prepare["fast_boot"], prepare["n_gpu"]) == ("s", False, 2)
    assert prepare["task"] != start["task"] == serve["task"] == plane.tasks[0].id
    assert (prepare["gpus"], start["gpus"]) == ("", "GPU 0: H100 (UUID: GPU-0)")
    assert prepare["socket"] != start["socket"] == serve["socket"]
    assert start["late"] == "yes"
    assert prepare["at"] + plane.snapshots.freeze_s <= thawed[0] <= start["at"]
    assert plane.tasks[0].restored
    assert plane.snapshots.checkpoints == [prepare["task"]]


def test_restore_shows_the_volume_of_that_moment(plane: ModalPlane) -> None:
    """After a restore the container sees files that were committed while it was frozen, and no removed ones."""

    def change(task: object) -> None:
        plane.volumes["sample-cache"].write("new.txt", b"1")
        plane.volumes["sample-cache"].remove("old.txt")

    plane.volumes.put("sample-cache", {"old.txt": b"0"})
    plane.snapshots.before_restore.append(change)
    deploy(plane)
    get(f"{plane.url_of('sample', 'Server', 'serve')}/health?model=v")
    assert next(e for e in events(plane, "v") if e["event"] == "start")["files"] == ["new.txt", "v.txt"]


def test_failing_restore_boots_a_fresh_container(plane: ModalPlane) -> None:
    """After a failed restore a fresh container answers the request."""
    plane.snapshots.fail_next_restore()
    deploy(plane)
    assert get(f"{plane.url_of('sample', 'Server', 'serve')}/health?model=f")[0] == 200
    assert [(task.state, task.restored) for task in plane.tasks] == [(TaskState.DEAD, False), (TaskState.READY, False)]
    assert names(plane, "f") == ["prepare", "prepare", "start", "serve"]


def test_restore_with_a_removed_open_file_fails(plane: ModalPlane) -> None:
    """A restore fails when a volume's file that the container has open was removed; a fresh container takes over."""
    plane.snapshots.before_restore.append(lambda _task: plane.volumes["sample-cache"].remove("holds-a-file.txt"))
    deploy(plane)
    assert get(f"{plane.url_of('sample', 'Server', 'serve')}/health?model=holds-a-file")[0] == 200
    assert [task.restore_failed for task in plane.tasks] == [True, False]
    assert "Restore of task" in command(plane, "app", "logs", "sample").stdout


def test_gpu_snapshot_that_fails_to_restore_boots_without_one(plane: ModalPlane) -> None:
    """The container exits with Modal's exit code for it, and the pool continues without a snapshot."""
    plane.snapshots.fail_next_gpu_restore()
    deploy(plane, SAMPLE_GPU_SNAPSHOT="1")
    assert get(f"{plane.url_of('sample', 'Server', 'serve')}/health?model=g")[0] == 200
    assert [task.exit_code for task in plane.tasks] == [222, None]
    assert events(plane, "g")[0]["gpus"] == "GPU 0: H100 (UUID: GPU-0)"


def test_gpu_snapshot_restores(plane: ModalPlane) -> None:
    """With a GPU snapshot the GPU is visible before the checkpoint, and the restore succeeds."""
    deploy(plane, SAMPLE_GPU_SNAPSHOT="1")
    assert get(f"{plane.url_of('sample', 'Server', 'serve')}/health?model=g")[0] == 200
    assert [task.restored for task in plane.tasks] == [True]
    assert {event["gpus"] for event in events(plane, "g") if "gpus" in event} == {"GPU 0: H100 (UUID: GPU-0)"}


FREEZING = """
import os, signal, subprocess, sys, time
from tests.fakes.modal import processes
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
with processes.frozen([child.pid]):
    print(child.pid, flush=True)
    time.sleep(float(sys.argv[1]))
print(open(f"/proc/{child.pid}/stat").read().rpartition(")")[2].split()[0], flush=True)
child.kill()
"""


def freezing(seconds: float) -> subprocess.Popen[str]:
    """Start a program that freezes another one for so long."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", FREEZING, str(seconds)]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)


def test_frozen_process_ends_with_the_plane_that_froze_it() -> None:
    """It is stopped, and so sees neither a signal nor the end of its parent."""
    with freezing(600) as program:
        frozen = psutil.Process(int((program.stdout and program.stdout.readline()) or 0))
        os.kill(program.pid, signal.SIGKILL)
    psutil.wait_procs([frozen], 10)
    assert not frozen.is_running() or frozen.status() == psutil.STATUS_ZOMBIE


def test_frozen_process_goes_on_afterwards() -> None:
    """Nothing kills it then."""
    output, _ = freezing(0.1).communicate(timeout=60)
    assert output.split()[1] in {"S", "R"}
