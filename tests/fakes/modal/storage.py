"""HTTP storage: blobs and blocks of volumes, which clients upload and download outside gRPC.

Owns one loopback port, which containers reach too. Blobs are in memory, files of volumes on disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
from typing import TYPE_CHECKING

from aiohttp import web
from grpclib import GRPCError, Status
from modal_proto import api_pb2 as pb

from .ids import Ids
from .rpc import unary
from .volumes import Volumes

if TYPE_CHECKING:
    from .sandbox import Task

BLOCK_BYTES = 8 * 2**20
MAX_BODY_BYTES = 2**30


class Storage:
    """Blobs by id, blocks by SHA-256."""

    def __init__(self, ids: Ids, volumes: Volumes) -> None:
        self._ids, self._volumes = ids, volumes
        self._contents: dict[str, bytes] = {}
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._runner: web.AppRunner | None = None
        self.uploaded: list[str] = []  # keys of the blobs and blocks that were put, in order
        self.stalls_after: int | None = None  # so many of them: further ones get no answer
        self.port: int = self._socket.getsockname()[1]

    async def start(self) -> None:
        application = web.Application(client_max_size=MAX_BODY_BYTES)
        application.router.add_put("/{key}", self._put)
        application.router.add_get("/{key}", self._get)
        application.router.add_get("/volumes/{volume}/{path:.+}", self._get_block)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.SockSite(self._runner, self._socket).start()

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        self._socket.close()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}"

    def content(self, key: str) -> bytes | None:
        """Return a blob by its id, or a block by its SHA-256 in hex."""
        return self._contents.get(key)

    async def _put(self, request: web.Request) -> web.Response:
        key, body = request.match_info["key"], await request.read()
        if self.stalls_after is not None and len(self.uploaded) >= self.stalls_after:
            await asyncio.Event().wait()  # until the client leaves
        self._contents[key] = body
        self.uploaded.append(key)
        etag = hashlib.md5(body, usedforsecurity=False).hexdigest()
        return web.Response(text=key, headers={"ETag": f'"{etag}"'})

    async def _get(self, request: web.Request) -> web.Response:
        body = self.content(request.match_info["key"])
        return web.Response(status=404) if body is None else web.Response(body=body)

    async def _get_block(self, request: web.Request) -> web.Response:
        volume, index = self._volumes.by_id(request.match_info["volume"]), int(request.query["block"])
        with volume.file(request.match_info["path"]).open("rb") as file:
            file.seek(index * BLOCK_BYTES)
            return web.Response(body=file.read(BLOCK_BYTES))

    @unary("BlobCreate")
    async def create_blob(self, request: pb.BlobCreateRequest, task: Task | None) -> pb.BlobCreateResponse:
        blob_id = self._ids.new("bl")
        urls = pb.UploadUrlList(items=[self.url(blob_id)])
        return pb.BlobCreateResponse(blob_ids=[blob_id], upload_urls=urls)

    @unary("BlobGet")
    async def get_blob(self, request: pb.BlobGetRequest, task: Task | None) -> pb.BlobGetResponse:
        if self.content(request.blob_id) is None:
            raise GRPCError(Status.NOT_FOUND, f"Blob {request.blob_id} not found")
        return pb.BlobGetResponse(download_url=self.url(request.blob_id))

    @unary("VolumeListFiles2")
    async def list_files(self, request: pb.VolumeListFiles2Request, task: Task | None) -> pb.VolumeListFiles2Response:
        entries = self._volumes.by_id(request.volume_id).entries(request.path, recursive=request.recursive)
        return pb.VolumeListFiles2Response(entries=entries)

    @unary("VolumeGetFile2")
    async def get_file(self, request: pb.VolumeGetFile2Request, task: Task | None) -> pb.VolumeGetFile2Response:
        path = request.path.strip("/")
        size = self._volumes.by_id(request.volume_id).file(path).stat().st_size
        blocks = range((size + BLOCK_BYTES - 1) // BLOCK_BYTES)
        urls = [self.url(f"volumes/{request.volume_id}/{path}?block={index}") for index in blocks]
        return pb.VolumeGetFile2Response(get_urls=urls, size=size, start=0, len=size)

    @unary("VolumePutFiles2")
    async def put_files(self, request: pb.VolumePutFiles2Request, task: Task | None) -> pb.VolumePutFiles2Response:
        volume = self._volumes.by_id(request.volume_id)
        missing = [
            pb.VolumePutFiles2Response.MissingBlock(
                file_index=i, block_index=j, put_url=self.url(block.contents_sha256.hex())
            )
            for i, file in enumerate(request.files)
            for j, block in enumerate(file.blocks)
            if self.content(block.contents_sha256.hex()) is None
        ]
        if missing:
            return pb.VolumePutFiles2Response(missing_blocks=missing)
        for file in request.files:
            if request.disallow_overwrite_existing_files and volume.holds(file.path):
                raise GRPCError(Status.ALREADY_EXISTS, f"{file.path}: already exists")
            blocks = (self._contents[block.contents_sha256.hex()] for block in file.blocks)
            body = b"".join(block.ljust(BLOCK_BYTES, b"\0") for block in blocks)  # sent without the zeros at their ends
            volume.write(file.path.strip("/"), body[: file.size])
        return pb.VolumePutFiles2Response()
