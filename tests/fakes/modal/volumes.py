"""Volumes with real files: a directory of the committed state, and a copy of it in each container that mounts it.

Implements Modal's semantics: uncommitted changes are visible nowhere else; of two commits of one file the last wins; a
reload pulls what others committed, fails while a process of the container has a file of the volume open, and may commit
pending changes. Writes and commits beyond `capacity_bytes` fail, and so does a look-up of a volume that does not exist.
"""

from __future__ import annotations

import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from modal_proto import api_pb2 as pb

from .ids import Ids
from .rpc import unary

if TYPE_CHECKING:
    from .sandbox import Task

DEFAULT_VERSION = 2
Signature = tuple[str, str | int, int]
Manifest = dict[str, Signature]


def manifest(directory: Path) -> Manifest:
    """Return the directory's content: {relative path: (kind, size or link target, modification time)}."""
    listed: Manifest = {}
    for path in sorted(directory.rglob("*")):
        try:
            info = path.lstat()
        except FileNotFoundError:  # a commit has renamed it meanwhile
            continue
        relative = str(path.relative_to(directory))
        if stat.S_ISLNK(info.st_mode):
            listed[relative] = ("link", str(path.readlink()), 0)
        elif stat.S_ISDIR(info.st_mode):
            listed[relative] = ("directory", 0, 0)
        elif stat.S_ISREG(info.st_mode):
            listed[relative] = ("file", info.st_size, info.st_mtime_ns)
    return listed


def apply_changes(source: Path, target: Path, before: Manifest, after: Manifest) -> list[str]:
    """Copy to `target` what changed in `source` between two manifests; return the changed relative paths."""
    changed = [path for path in before.keys() | after.keys() if before.get(path) != after.get(path)]
    for relative in sorted(set(changed) - after.keys(), reverse=True):
        _remove(target / relative)
    for relative in sorted(set(changed) & after.keys()):
        _place(source / relative, target / relative, after[relative][0])
    return sorted(changed)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        if not any(path.iterdir()):
            path.rmdir()
    else:
        path.unlink(missing_ok=True)


def _place(source: Path, target: Path, kind: str) -> None:
    if kind == "directory":
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.plane-staged")
    shutil.copy2(source, staged, follow_symlinks=False)
    staged.replace(target)


class Volume:
    """The committed state. Tests read and write it as another container or `modal volume put` would."""

    def __init__(self, volume_id: str, name: str, path: Path, version: int) -> None:
        self.id, self.name, self.path, self.version = volume_id, name, path, version
        self.capacity_bytes: int | None = None
        self.commits: list[str] = []  # ids of the tasks that committed, in order
        path.mkdir(parents=True, exist_ok=True)

    def files(self) -> list[str]:
        return [path for path, (kind, _, _) in manifest(self.path).items() if kind != "directory"]

    def read(self, relative: str) -> bytes:
        return (self.path / relative).read_bytes()

    def write(self, relative: str, content: bytes) -> None:
        target = self.path / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)

    def remove(self, relative: str) -> None:
        target = self.path / relative
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink()

    def file(self, relative: str) -> Path:
        """Return the path of a committed file. Raises: GRPCError NOT_FOUND."""
        path = self.path / relative.strip("/")
        if not path.is_file():
            raise GRPCError(Status.NOT_FOUND, f"No such file in volume '{self.name}': {relative}")
        return path

    def holds(self, relative: str) -> bool:
        return (self.path / relative.strip("/")).exists()

    def entries(self, relative: str, *, recursive: bool) -> list[pb.FileEntry]:
        """List files and directories at or under a path, as `modal volume ls` shows them."""
        start = relative.strip("/")
        if start and not self.holds(start):
            raise GRPCError(Status.NOT_FOUND, f"No such path in volume '{self.name}': {relative}")
        listed = manifest(self.path)
        if start in listed and listed[start][0] != "directory":
            return [_entry(start, listed[start])]
        depth = len(Path(start).parts)
        inside = [path for path in listed if Path(path).is_relative_to(start) and path != start]
        return [_entry(p, listed[p]) for p in inside if recursive or len(Path(p).parts) == depth + 1]

    def size_bytes(self) -> int:
        return sum(int(size) for kind, size, _ in manifest(self.path).values() if kind == "file")


def _entry(path: str, signature: Signature) -> pb.FileEntry:
    kinds = {"file": pb.FileEntry.FILE, "directory": pb.FileEntry.DIRECTORY, "link": pb.FileEntry.SYMLINK}
    kind, size, changed_ns = signature
    size_bytes = int(size) if kind == "file" else 0
    return pb.FileEntry(path=path, type=kinds[kind], size=size_bytes, mtime=changed_ns // 10**9)


@dataclass
class VolumeView:
    """A volume as one container sees it: a working copy, and its content at the last synchronisation."""

    volume: Volume
    path: Path
    read_only: bool
    synced: Manifest = field(default_factory=dict)
    pid: int | None = None

    @property
    def reach(self) -> Path:
        """Path of the working copy for the plane: a limited volume is in the container's mount namespace."""
        return Path(f"/proc/{self.pid}/root{self.path}") if self.pid else self.path

    def note_process(self, pid: int) -> None:
        """Record the process in whose mount namespace a limited volume is."""
        self.pid = pid if self.volume.capacity_bytes else None

    def pull(self) -> None:
        """Update the working copy to the committed state."""
        committed = manifest(self.volume.path)
        self.reach.mkdir(parents=True, exist_ok=True)
        apply_changes(self.volume.path, self.reach, manifest(self.reach), committed)
        self.synced = manifest(self.reach)

    def commit(self, task_id: str) -> None:
        """Commit what changed here since the last synchronisation."""
        if self.read_only:
            raise GRPCError(Status.FAILED_PRECONDITION, f"Volume '{self.volume.name}' is mounted read-only")
        self._refuse_overflow()
        now = manifest(self.reach)
        apply_changes(self.reach, self.volume.path, self.synced, now)
        self.synced = now
        self.volume.commits.append(task_id)

    def _refuse_overflow(self) -> None:
        capacity = self.volume.capacity_bytes
        size = sum(int(size) for kind, size, _ in manifest(self.reach).values() if kind == "file")
        if capacity is not None and size > capacity:
            text = f"Volume '{self.volume.name}' is full: {size} bytes to commit, {capacity} bytes of space"
            raise GRPCError(Status.INVALID_ARGUMENT, text)


class Volumes:
    """Volumes by name and id, and the views of running containers."""

    def __init__(self, ids: Ids, directory: Path) -> None:
        self._ids, self._directory = ids, directory
        self._by_id: dict[str, Volume] = {}

    def put(self, name: str, files: dict[str, bytes] | None = None, version: int = DEFAULT_VERSION) -> Volume:
        """Create the volume where it does not exist, and commit the files to it."""
        volume = self._named(name) or self._create(name, version)
        for relative, content in (files or {}).items():
            volume.write(relative, content)
        return volume

    def __getitem__(self, name: str) -> Volume:
        if volume := self._named(name):
            return volume
        raise KeyError(f"No volume {name!r}; there are {sorted(v.name for v in self._by_id.values())}.")

    def __iter__(self) -> Iterator[Volume]:
        return iter(list(self._by_id.values()))

    def by_id(self, volume_id: str) -> Volume:
        if volume := self._by_id.get(volume_id):
            return volume
        raise GRPCError(Status.NOT_FOUND, f"Volume {volume_id} not found")

    def metadata(self, volume_id: str) -> pb.VolumeMetadata:
        volume = self.by_id(volume_id)
        return pb.VolumeMetadata(name=volume.name, version=volume.version)  # type: ignore[arg-type]

    def view(self, mount: pb.VolumeMount, work: Path) -> VolumeView:
        """Copy the volume's committed state into the container's directory, at the mount's path."""
        volume = self.by_id(mount.volume_id)
        view = VolumeView(volume, work / mount.mount_path.lstrip("/"), mount.read_only)
        view.pull()
        return view

    def _named(self, name: str) -> Volume | None:
        return next((volume for volume in list(self._by_id.values()) if name and volume.name == name), None)

    def _create(self, name: str, version: int) -> Volume:
        volume_id = self._ids.new("vo")
        volume = Volume(volume_id, name, self._directory / (name or volume_id), version)
        self._by_id[volume_id] = volume
        return volume

    @unary("VolumeGetOrCreate")
    async def get_or_create(
        self, request: pb.VolumeGetOrCreateRequest, task: Task | None
    ) -> pb.VolumeGetOrCreateResponse:
        volume = self._named(request.deployment_name)
        if volume is None and request.object_creation_type == pb.OBJECT_CREATION_TYPE_UNSPECIFIED:
            raise GRPCError(Status.NOT_FOUND, f"Volume '{request.deployment_name}' not found in environment 'main'")
        volume = volume or self._create(request.deployment_name, int(request.version) or DEFAULT_VERSION)
        metadata = self.metadata(volume.id)
        return pb.VolumeGetOrCreateResponse(volume_id=volume.id, version=metadata.version, metadata=metadata)

    @unary("VolumeList")
    async def list(self, request: pb.VolumeListRequest, task: Task | None) -> pb.VolumeListResponse:
        items = [
            pb.VolumeListItem(label=v.name, volume_id=v.id, created_at=time.time(), metadata=self.metadata(v.id))
            for v in self
            if v.name
        ]
        return pb.VolumeListResponse(items=items, environment_name="main")

    @unary("VolumeDelete")
    async def delete(self, request: pb.VolumeDeleteRequest, task: Task | None) -> Empty:
        volume = self._by_id.pop(request.volume_id, None)
        if volume is not None:
            shutil.rmtree(volume.path)
        return Empty()

    @unary("VolumeRemoveFile2")
    async def remove_file(self, request: pb.VolumeRemoveFile2Request, task: Task | None) -> Empty:
        volume = self.by_id(request.volume_id)
        if not volume.holds(request.path):
            raise GRPCError(Status.NOT_FOUND, f"No such path in volume '{volume.name}': {request.path}")
        volume.remove(request.path.strip("/"))
        return Empty()

    @unary("VolumeCommit")
    async def commit(self, request: pb.VolumeCommitRequest, task: Task | None) -> pb.VolumeCommitResponse:
        self._view_of(request.volume_id, task).commit(task.id if task else "client")
        return pb.VolumeCommitResponse()  # the client reloads next, and fails there where files are open

    @unary("VolumeReload")
    async def reload(self, request: pb.VolumeReloadRequest, task: Task | None) -> Empty:
        view = self._view_of(request.volume_id, task)
        if task is not None and (open_files := task.open_files(view.path)):
            text = f"there are open files preventing the operation: {', '.join(map(str, open_files))}"
            raise GRPCError(Status.ABORTED, text)
        if not view.read_only:
            view.commit(task.id if task else "client")
        view.pull()
        return Empty()

    def _view_of(self, volume_id: str, task: Task | None) -> VolumeView:
        for view in task.volume_views if task else []:
            if view.volume.id == volume_id:
                return view
        raise GRPCError(Status.FAILED_PRECONDITION, f"Volume {volume_id} is not mounted where this call came from")
