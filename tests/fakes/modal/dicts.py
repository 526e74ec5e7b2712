"""Dictionaries that containers and clients share (`modal.Dict`): entries by serialized key, each call atomic.

Handles the calls of the pinned client. A look-up of a dictionary that does not exist is an error. Entries do not expire
here; Modal removes an entry after seven days without an access.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from modal._serialization import deserialize, serialize
from modal_proto import api_pb2 as pb

from .ids import Ids
from .rpc import streaming, unary

if TYPE_CHECKING:
    from .sandbox import Task


class Dict:
    """One dictionary. A test reads and writes it like a mapping of the values that programs put there."""

    def __init__(self, dict_id: str, name: str) -> None:
        self.id, self.name = dict_id, name
        self.created_at = time.time()
        self.entries: dict[bytes, bytes] = {}

    def __getitem__(self, key: Any) -> Any:
        return deserialize(self.entries[serialize(key)], None)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[serialize(key)] = serialize(value)

    def __contains__(self, key: Any) -> bool:
        return serialize(key) in self.entries

    def keys(self) -> list[Any]:
        return [deserialize(key, None) for key in list(self.entries)]

    @property
    def metadata(self) -> pb.DictMetadata:
        return pb.DictMetadata(name=self.name, creation_info=pb.CreationInfo(created_at=self.created_at))


class Dicts:
    """Dictionaries by name and id."""

    def __init__(self, ids: Ids) -> None:
        self._ids = ids
        self._by_id: dict[str, Dict] = {}

    def __getitem__(self, name: str) -> Dict:
        if found := self._named(name):
            return found
        raise KeyError(f"No dictionary {name!r}; there are {sorted(d.name for d in self)}.")

    def __iter__(self) -> Iterator[Dict]:
        return iter(list(self._by_id.values()))

    def put(self, name: str) -> Dict:
        """Create the dictionary where it does not exist."""
        return self._named(name) or self._create(name)

    def _named(self, name: str) -> Dict | None:
        return next((found for found in self if name and found.name == name), None)

    def _create(self, name: str) -> Dict:
        made = Dict(self._ids.new("di"), name)
        self._by_id[made.id] = made
        return made

    def _of(self, request: Any) -> Dict:
        if found := self._by_id.get(request.dict_id):
            return found
        raise GRPCError(Status.NOT_FOUND, f"Dict {request.dict_id} not found")

    @unary("DictGetOrCreate")
    async def get_or_create(self, request: pb.DictGetOrCreateRequest, task: Task | None) -> pb.DictGetOrCreateResponse:
        found = self._named(request.deployment_name)
        creation = request.object_creation_type
        if found is None and creation == pb.OBJECT_CREATION_TYPE_UNSPECIFIED:
            raise GRPCError(Status.NOT_FOUND, f"Dict '{request.deployment_name}' not found in environment 'main'")
        if found and creation == pb.OBJECT_CREATION_TYPE_CREATE_FAIL_IF_EXISTS:
            raise GRPCError(Status.ALREADY_EXISTS, f"Dict '{request.deployment_name}' already exists")
        found = found or self._create(request.deployment_name)
        return pb.DictGetOrCreateResponse(dict_id=found.id, metadata=found.metadata)

    @unary("DictUpdate")
    async def update(self, request: pb.DictUpdateRequest, task: Task | None) -> pb.DictUpdateResponse:
        entries = self._of(request).entries
        given = {entry.key: entry.value for entry in request.updates}
        created = bool(given.keys() - entries.keys()) or not request.if_not_exists
        for key, value in given.items():
            if not (request.if_not_exists and key in entries):
                entries[key] = value
        return pb.DictUpdateResponse(created=created)

    @unary("DictGet")
    async def get(self, request: pb.DictGetRequest, task: Task | None) -> pb.DictGetResponse:
        value = self._of(request).entries.get(request.key)
        return pb.DictGetResponse(found=value is not None, value=value)

    @unary("DictContains")
    async def contains(self, request: pb.DictContainsRequest, task: Task | None) -> pb.DictContainsResponse:
        return pb.DictContainsResponse(found=request.key in self._of(request).entries)

    @unary("DictPop")
    async def pop(self, request: pb.DictPopRequest, task: Task | None) -> pb.DictPopResponse:
        value = self._of(request).entries.pop(request.key, None)
        return pb.DictPopResponse(found=value is not None, value=value)

    @unary("DictLen")
    async def size(self, request: pb.DictLenRequest, task: Task | None) -> pb.DictLenResponse:
        return pb.DictLenResponse(len=len(self._of(request).entries))

    @streaming("DictContents")
    async def contents(self, request: pb.DictContentsRequest, task: Task | None) -> AsyncIterator[pb.DictEntry]:
        for key, value in list(self._of(request).entries.items()):
            yield pb.DictEntry(key=key if request.keys else b"", value=value if request.values else b"")

    @unary("DictClear")
    async def clear(self, request: pb.DictClearRequest, task: Task | None) -> Empty:
        self._of(request).entries.clear()
        return Empty()

    @unary("DictDelete")
    async def delete(self, request: pb.DictDeleteRequest, task: Task | None) -> Empty:
        self._by_id.pop(self._of(request).id)
        return Empty()

    @unary("DictList")
    async def list(self, request: pb.DictListRequest, task: Task | None) -> pb.DictListResponse:
        named = [found for found in self if found.name]
        infos = [
            pb.DictListResponse.DictInfo(name=d.name, dict_id=d.id, created_at=d.created_at, metadata=d.metadata)
            for d in named
        ]
        return pb.DictListResponse(dicts=infos, environment_name="main")
