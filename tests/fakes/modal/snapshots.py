"""Checkpoint and restore: freezes the container, changes what a restore changes, and thaws the container.

Owns what differs after a restore: task id, socket, environment, GPUs, and the files of volumes, which get the state
that is committed at that moment. The process is the same: its memory is what a snapshot would contain. A restore fails
when a test requests it and, as on Modal, when a volume's file that the container has open was removed: the container
dies, and the next one of its pool boots without a snapshot.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2 as pb

from . import processes
from .gpus import attach_gpus
from .launch import Launcher
from .rpc import unary
from .sandbox import Task

CONNECTIONS_CLOSE_S = 0.05  # the container closes its connections after the answer, before it waits for the restore


class Snapshots:
    """Settings of a test, and the record of checkpoints. Change the settings before the container boots."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self.freeze_s = 0.05
        self.environment: dict[str, str] = {}
        self.before_restore: list[Callable[[Task], None]] = []
        self.checkpoints: list[str] = []
        self._failures = 0
        self._gpu_failures = 0
        self._jobs: set[asyncio.Task[None]] = set()

    @property
    def enabled(self) -> bool:
        return self._launcher.snapshots_enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._launcher.snapshots_enabled = value

    def fail_next_restore(self, times: int = 1) -> None:
        """Let the next restores fail: the frozen container dies, and a fresh one boots without a snapshot."""
        self._failures += times

    def fail_next_gpu_restore(self, times: int = 1) -> None:
        """Let the next restores of GPU memory fail: the container exits with Modal's exit code for it."""
        self._gpu_failures += times

    @unary("ContainerCheckpoint")
    async def checkpoint(self, request: pb.ContainerCheckpointRequest, task: Task) -> Empty:
        self.checkpoints.append(task.id)
        job = asyncio.ensure_future(self._restore(task))
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        return Empty()

    async def _restore(self, task: Task) -> None:
        await asyncio.sleep(CONNECTIONS_CLOSE_S)
        with processes.frozen(task.members()):
            await asyncio.sleep(self.freeze_s)
            for change in self.before_restore:
                await asyncio.to_thread(change, task)
            if self._is_lost(task):
                await self._lose(task)
            else:
                await self._move(task)

    def _is_lost(self, task: Task) -> bool:
        if self._failures:
            self._failures -= 1
            return True
        return any(self._lost_files(task))

    def _lost_files(self, task: Task) -> list[Path]:
        """List open files of volumes that are no longer committed."""
        lost: list[Path] = []
        for view in task.volume_views:
            held = [path for path in task.open_files(view.path) if path != view.path.resolve()]
            names = [path.relative_to(view.path.resolve()) for path in held]
            lost += [name for name in names if not (view.volume.path / name).exists()]
        return lost

    async def _lose(self, task: Task) -> None:
        text = f"Restore of task {task.id} failed; its pool goes on without the snapshot.\n"
        task.on_line(task, text)
        task.restore_failed = True
        await task.end()

    async def _move(self, task: Task) -> None:
        """Give the frozen container its new identity; the state file comes last, since the container waits for it."""
        former = task.servers[-1]
        task.former_ids.append(task.id)
        task.id = self._launcher.ids.new("ta")
        socket = await self._launcher.listen(task)
        for view in task.volume_views:
            view.pull()
        attach_gpus(task)
        self._change_environment(task)
        task.gpu_restore_path.write_text("error" if self._gpu_failures else "restore")
        self._gpu_failures = max(0, self._gpu_failures - 1)
        state = {"task_id": task.id, "function_id": task.function.id, "server_url": f"unix://{socket}"}
        staged = task.state_path.with_suffix(".tmp")
        staged.write_text(json.dumps(state))
        staged.replace(task.state_path)
        task.restored = True
        former.close()

    def _change_environment(self, task: Task) -> None:
        entries = task.spec_environ_path.read_text().split("\0")
        environment = dict(entry.split("=", 1) for entry in entries) | self.environment
        task.spec_environ_path.write_text("\0".join(f"{name}={value}" for name, value in environment.items()))
