"""Environments, secrets, mounts and images: what a deploy creates before its functions.

Owns their contents. An image is recorded, never built: tests assert on its Dockerfile commands, and containers get its
ENV. Not supported: build functions (`run_function`), which would need a builder.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from modal_proto import api_pb2 as pb

from .ids import Ids
from .rpc import streaming, unary
from .storage import Storage

if TYPE_CHECKING:
    from .sandbox import Task

ENVIRONMENT = "main"
BUILDER_VERSION = "2026.10"
SUCCESS = pb.GenericResult(status=pb.GenericResult.GENERIC_STATUS_SUCCESS)
_ENV = re.compile(r"ENV (?P<name>\w+)=(?P<value>.*)", re.DOTALL)


class Environments:
    """One workspace with one environment, `main`."""

    def __init__(self, ids: Ids) -> None:
        self._id = ids.new("en")

    @unary("ClientHello")
    async def hello(self, request: Empty, task: Task | None) -> pb.ClientHelloResponse:
        return pb.ClientHelloResponse(image_builder_version=BUILDER_VERSION)

    @unary("EnvironmentGetOrCreate")
    async def get(
        self, request: pb.EnvironmentGetOrCreateRequest, task: Task | None
    ) -> pb.EnvironmentGetOrCreateResponse:
        if request.deployment_name not in ("", ENVIRONMENT):
            raise GRPCError(Status.NOT_FOUND, f"Environment '{request.deployment_name}' not found")
        settings = pb.EnvironmentSettings(image_builder_version=BUILDER_VERSION)
        metadata = pb.EnvironmentMetadata(name=ENVIRONMENT, settings=settings)
        return pb.EnvironmentGetOrCreateResponse(environment_id=self._id, metadata=metadata)

    @unary("EnvironmentList")
    async def list(self, request: Empty, task: Task | None) -> pb.EnvironmentListResponse:
        item = pb.EnvironmentListItem(name=ENVIRONMENT, default=True, environment_id=self._id)
        return pb.EnvironmentListResponse(items=[item])

    @unary("WorkspaceNameLookup")
    async def workspace(self, request: Empty, task: Task | None) -> pb.WorkspaceNameLookupResponse:
        return pb.WorkspaceNameLookupResponse(workspace_name="plane", username="plane")


@dataclass
class Secret:
    """A named secret, or an anonymous one (name ""), such as `with_options(env=…)` creates."""

    id: str
    name: str
    values: dict[str, str] = field(repr=False)


class Secrets:
    """Secrets by name and id. A look-up of a missing secret, or of one without a required key, is an error."""

    def __init__(self, ids: Ids) -> None:
        self._ids = ids
        self._by_id: dict[str, Secret] = {}

    def put(self, name: str, values: dict[str, str]) -> None:
        """Create the secret, or replace its values: containers that start later see the new ones."""
        if existing := self._named(name):
            existing.values = dict(values)
        else:
            self._create(name, values)

    def get(self, name: str) -> dict[str, str]:
        """Return the values. Raises: KeyError where no secret has that name."""
        if secret := self._named(name):
            return dict(secret.values)
        raise KeyError(name)

    def remove(self, name: str) -> None:
        if secret := self._named(name):
            del self._by_id[secret.id]

    def names(self) -> list[str]:
        return [secret.name for secret in self._by_id.values() if secret.name]

    def environment(self, secret_ids: list[str]) -> dict[str, str]:
        """Merge the secrets as a container gets them: later ones win."""
        merged: dict[str, str] = {}
        for secret_id in secret_ids:
            merged |= self._by_id[secret_id].values
        return merged

    def _named(self, name: str) -> Secret | None:
        return next((secret for secret in list(self._by_id.values()) if name and secret.name == name), None)

    def _create(self, name: str, values: dict[str, str]) -> Secret:
        secret = Secret(self._ids.new("st"), name, dict(values))
        self._by_id[secret.id] = secret
        return secret

    @unary("SecretGetOrCreate")
    async def get_or_create(
        self, request: pb.SecretGetOrCreateRequest, task: Task | None
    ) -> pb.SecretGetOrCreateResponse:
        existing = self._named(request.deployment_name)
        creation = request.object_creation_type
        if creation == pb.OBJECT_CREATION_TYPE_UNSPECIFIED:
            secret = self._look_up(request, existing)
        elif existing and creation == pb.OBJECT_CREATION_TYPE_CREATE_FAIL_IF_EXISTS:
            raise GRPCError(Status.ALREADY_EXISTS, f"Secret '{request.deployment_name}' already exists")
        elif existing and creation == pb.OBJECT_CREATION_TYPE_CREATE_OVERWRITE_IF_EXISTS:
            existing.values = dict(request.env_dict)
            secret = existing
        else:
            secret = existing or self._create(request.deployment_name, dict(request.env_dict))
        return pb.SecretGetOrCreateResponse(secret_id=secret.id, metadata=self._metadata(secret))

    def _look_up(self, request: pb.SecretGetOrCreateRequest, secret: Secret | None) -> Secret:
        if secret is None:
            raise GRPCError(Status.NOT_FOUND, f"Secret '{request.deployment_name}' not found in environment 'main'")
        if missing := [key for key in request.required_keys if key not in secret.values]:
            text = f"Secret '{secret.name}' is missing key(s): {', '.join(missing)}"
            raise GRPCError(Status.FAILED_PRECONDITION, text)
        return secret

    def _metadata(self, secret: Secret) -> pb.SecretMetadata:
        return pb.SecretMetadata(name=secret.name, keys=list(secret.values), environment_name=ENVIRONMENT)

    @unary("SecretList")
    async def list(self, request: pb.SecretListRequest, task: Task | None) -> pb.SecretListResponse:
        named = [secret for secret in self._by_id.values() if secret.name]
        items = [
            pb.SecretListItem(
                label=s.name, secret_id=s.id, created_at=1.0, environment_name=ENVIRONMENT, metadata=self._metadata(s)
            )
            for s in named
        ]
        return pb.SecretListResponse(items=items, environment_name=ENVIRONMENT)

    @unary("SecretDelete")
    async def delete(self, request: pb.SecretDeleteRequest, task: Task | None) -> Empty:
        self._by_id.pop(request.secret_id, None)
        return Empty()


@dataclass(frozen=True)
class MountedFile:
    sha256: str
    mode: int


_UPLOADED: dict[str, bytes] = {}  # contents by their hashes, for all planes of this process


class Mounts:
    """Uploaded files by content, and mounts as {path in the container: file}."""

    def __init__(self, ids: Ids, storage: Storage) -> None:
        self._ids, self._storage = ids, storage
        self._mounts: dict[str, dict[str, MountedFile]] = {}

    def files(self, mount_id: str) -> dict[str, tuple[bytes, int]]:
        """Return {path in the container: (content, mode)}; empty for Modal's own mounts (client, Python)."""
        listed = self._mounts.get(mount_id, {})
        return {path: (_UPLOADED[file.sha256], file.mode) for path, file in listed.items()}

    @unary("MountGetOrCreate")
    async def get_or_create(
        self, request: pb.MountGetOrCreateRequest, task: Task | None
    ) -> pb.MountGetOrCreateResponse:
        if request.object_creation_type == pb.OBJECT_CREATION_TYPE_UNSPECIFIED:
            mount_id = f"mo-global-{request.deployment_name}"
        else:
            mount_id = self._ids.new("mo")
            self._mounts[mount_id] = {f.filename: MountedFile(f.sha256_hex, f.mode) for f in request.files}
        digest = hashlib.sha256(repr(sorted((f.filename, f.sha256_hex) for f in request.files)).encode()).hexdigest()
        metadata = pb.MountHandleMetadata(content_checksum_sha256_hex=digest)
        return pb.MountGetOrCreateResponse(mount_id=mount_id, handle_metadata=metadata)

    @unary("MountBatchedCheckExistence")
    async def missing(
        self, request: pb.MountBatchedCheckExistenceRequest, task: Task | None
    ) -> pb.MountBatchedCheckExistenceResponse:
        hashes = [digest for digest in request.sha256_hex_hashes if digest not in _UPLOADED]
        return pb.MountBatchedCheckExistenceResponse(missing_sha256_hex_hashes=hashes)

    @unary("MountPutFile")
    async def put_file(self, request: pb.MountPutFileRequest, task: Task | None) -> pb.MountPutFileResponse:
        kind = request.WhichOneof("data_oneof")
        if kind == "data_blob_id":
            _UPLOADED[request.sha256_hex] = self._storage.content(request.data_blob_id) or b""
        elif kind == "data":
            _UPLOADED[request.sha256_hex] = request.data
        return pb.MountPutFileResponse(exists=request.sha256_hex in _UPLOADED)


class Images:
    """Images by id; the same definition is the same image, as with Modal's cache."""

    def __init__(self, ids: Ids) -> None:
        self._ids = ids
        self._images: dict[str, pb.Image] = {}
        self._by_definition: dict[bytes, str] = {}

    def layers(self, image_id: str) -> list[str]:
        """Return every Dockerfile command of the image, base first, the `FROM base` lines of inner layers left out."""
        image = self._images[image_id]
        inner = [command for base in image.base_images for command in self.layers(base.image_id)]
        own = [c for c in image.dockerfile_commands if not (image.base_images and c.startswith("FROM base"))]
        return inner + own

    def env(self, image_id: str) -> dict[str, str]:
        """Return what the image's ENV commands set; later ones win."""
        environment: dict[str, str] = {}
        for command in self.layers(image_id) if image_id in self._images else []:
            if match := _ENV.fullmatch(command):
                environment[match["name"]] = "".join(shlex.split(match["value"]))
        return environment

    @unary("ImageGetOrCreate")
    async def get_or_create(
        self, request: pb.ImageGetOrCreateRequest, task: Task | None
    ) -> pb.ImageGetOrCreateResponse:
        if request.build_function_id or request.image.build_function.definition:
            raise GRPCError(Status.UNIMPLEMENTED, "The modal plane for tests builds no images: no run_function.")
        definition = request.image.SerializeToString(deterministic=True)
        image_id = self._by_definition.get(definition)
        if image_id is None:
            image_id = self._by_definition[definition] = self._ids.new("im")
            self._images[image_id] = request.image
        metadata = pb.ImageMetadata(image_builder_version=BUILDER_VERSION)
        return pb.ImageGetOrCreateResponse(image_id=image_id, result=SUCCESS, metadata=metadata)

    @streaming("ImageJoinStreaming")
    async def join(
        self, request: pb.ImageJoinStreamingRequest, task: Task | None
    ) -> AsyncIterator[pb.ImageJoinStreamingResponse]:
        metadata = pb.ImageMetadata(image_builder_version=BUILDER_VERSION)
        yield pb.ImageJoinStreamingResponse(result=SUCCESS, eof=True, metadata=metadata)
