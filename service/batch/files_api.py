"""The routes of `/v1/files`: upload, list, content, deletion. A client sees its own files only."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import BinaryIO

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from service.batch.room import ArrivingUpload, Rooms, check_disk, storing
from service.batch.store import KEPT_S, ClientStore, Store, StoredFile, files_of
from service.batch.upload_form import UploadForm
from service.boots.records import new_id
from service.gateway.pages import number_of
from service.gateway.threads import in_thread
from service.gateway.uploads import Upload, Uploads
from service.in_engine.vllm_service import api_error
from service.in_engine.vllm_service.api_error import APIError
from service.in_engine.vllm_service.http_contract import FILE_LIMIT, JSON, MIB, header_of

_WRITTEN = MIB  # bytes that are written, and read, at a time
_SHORTEST_S = 3600
_NO_LINE_BREAK = re.compile(r"[\r\n\"\\]")


class FilesApi:
    """The handlers of these routes.

    Args:
        store: The files.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._uploads, self._rooms = store, Uploads(), Rooms()

    def routes(self) -> list[Route]:
        """Return the routes as Starlette has them."""
        return [
            Route("/v1/files", self._upload, methods=["POST"]),
            Route("/v1/files", self._list, methods=["GET"]),
            Route("/v1/files/{file_id}", self._file, methods=["GET"]),
            Route("/v1/files/{file_id}", self._delete, methods=["DELETE"]),
            Route("/v1/files/{file_id}/content", self._content, methods=["GET"]),
        ]

    async def _upload(self, request: Request) -> Response:
        headers, store = request.scope["headers"], store_of(self._store, request)
        if declared := header_of(headers, b"content-length"):
            api_error.check_length(declared.encode("latin-1"), FILE_LIMIT + MIB)
        if header_of(headers, b"content-encoding").lower() not in {"", "identity"}:
            raise APIError(
                415, "A file is taken without Content-Encoding. Send it as it is.", code="unsupported_content_encoding"
            )
        async with self._rooms.upload(store) as upload:
            arriving = _ArrivingFile(header_of(headers, b"content-type"), upload)
            with storing():
                file = await in_thread(lambda: store.open_upload(upload.directory))
                with self._uploads.track(request.state.client.name) as tracked, file:
                    await arriving.read(request, tracked, file)
                stored = arriving.stored()
                await in_thread(lambda: store.add(stored, upload.directory))
            upload.is_whole = True
        return _json(stored.to_fields())

    async def _list(self, request: Request) -> Response:
        store = store_of(self._store, request)
        purpose = request.query_params.get("purpose")
        files = await in_thread(store.files)
        found = [file.to_fields() for file in files if purpose in {None, file.purpose}]
        return page(request, found, default=10_000, most=10_000)

    async def _file(self, request: Request) -> Response:
        store = store_of(self._store, request)
        return _json((await in_thread(lambda: found_file(store, request.path_params["file_id"]))).to_fields())

    async def _delete(self, request: Request) -> Response:
        store = store_of(self._store, request)

        def delete() -> StoredFile:
            file = found_file(store, request.path_params["file_id"])
            using = next((one for one in store.batches() if file.id in files_of(one) and not one.is_final), None)
            if using:
                message = f"File '{file.id}' is needed by batch '{using.id}', which is {using.status}."
                raise APIError(409, f"{message} Cancel the batch first, or wait for its end.", code="file_in_use")
            store.delete(file.id)
            return file

        return _json({"id": (await in_thread(delete)).id, "object": "file", "deleted": True})

    async def _content(self, request: Request) -> Response:
        store = store_of(self._store, request)
        file = await in_thread(lambda: found_file(store, request.path_params["file_id"]))
        name = _NO_LINE_BREAK.sub("_", file.filename).encode("ascii", "replace").decode()
        headers = {"content-length": str(file.bytes), "content-disposition": f'attachment; filename="{name}"'}
        try:
            content = await in_thread(lambda: store.content(file.id).open("rb"))
        except FileNotFoundError:
            raise _no_file(store, file.id) from None
        return StreamingResponse(_pieces(content, file.bytes), media_type="application/jsonl", headers=headers)


class _ArrivingFile:
    """A file that is being uploaded: what has arrived goes to the disk in large pieces, on a thread.

    Args:
        content_type: The request's.
        upload: Its room.
    """

    def __init__(self, content_type: str, upload: ArrivingUpload) -> None:
        self._form = UploadForm(content_type, self._write)
        self._upload = upload
        self._waiting = bytearray()
        self._size = self._lines = 0

    def _write(self, piece: bytes) -> None:
        self._size += len(piece)
        self._lines += piece.count(b"\n")
        if self._size > FILE_LIMIT:
            raise api_error.too_large(FILE_LIMIT)
        self._upload.take(len(piece))
        self._waiting += piece

    async def read(self, request: Request, tracked: Upload, file: BinaryIO) -> None:
        """Take the whole body.

        Raises:
            APIError: 400, 408, 413, or 499 when the client left.
        """
        more = True
        while more:
            message = await tracked.receive(request.receive)
            if message["type"] == "http.disconnect":
                request.state.log.client_left = True
                raise APIError(499, "The client left before its whole file had arrived.", code="client_left")
            piece, more = message.get("body", b""), message.get("more_body", False)
            request.state.log.bytes_in += len(piece)
            self._form.feed(piece)
            if len(self._waiting) >= _WRITTEN or not more:
                waiting, self._waiting = self._waiting, bytearray()
                await in_thread(partial(self._save, file, waiting))
        if not self._form.is_complete:
            raise APIError(400, "The form ends before its last boundary. Send it again.", code="invalid_form")

    def _save(self, file: BinaryIO, piece: bytearray) -> None:
        check_disk(self._upload.directory)
        file.write(piece)

    def stored(self) -> StoredFile:
        """Return what is known of it, once it is there.

        Raises:
            APIError: 400: fields are missing or wrong.
        """
        form, now = self._form, int(time.time())
        if form.filename is None:
            raise _invalid("file", "is missing; send the file as a file")
        if (purpose := form.fields.get("purpose")) != "batch":
            given = "is missing" if purpose is None else f"is '{purpose[:40]}'"
            raise _invalid("purpose", f"{given}; the one purpose here is 'batch'")
        if not self._size:
            raise _invalid("file", "is empty; send one request in JSON a line")
        anchor = form.fields.get("expires_after[anchor]", "created_at")
        kept_s = seconds_kept(anchor, form.fields.get("expires_after[seconds]", str(KEPT_S)))
        return StoredFile(
            id=f"file-{new_id()}",
            bytes=self._size,
            created_at=now,
            expires_at=now + kept_s,
            filename=form.filename[:255],
            purpose="batch",
            lines=self._lines,
        )


def seconds_kept(anchor: object, seconds: object) -> int:
    """Return how long a file is kept, as `expires_after` says.

    Raises:
        APIError: 400.
    """
    text = str(seconds)
    if anchor != "created_at":
        raise _invalid("expires_after[anchor]", f"is '{str(anchor)[:40]}'; write created_at")
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and _SHORTEST_S <= int(text) <= KEPT_S):
        raise _invalid("expires_after[seconds]", f"is '{text[:40]}'; write {_SHORTEST_S} to {KEPT_S}")
    return int(text)


def store_of(store: Store, request: Request) -> ClientStore:
    """Return the files and batches of the client whose request it is."""
    client = request.state.client
    return store.of(client.name, client.identity)


def found_file(store: ClientStore, name: str) -> StoredFile:
    """Return a file. Blocks.

    Raises:
        APIError: 404: the client has none of this id.
    """
    if name.startswith("file-") and (file := store.file(name)):
        return file
    raise _no_file(store, name)


def _no_file(store: ClientStore, name: str) -> APIError:
    return APIError(404, f"The key '{store.owner}' has no file '{name[:100]}'. GET /v1/files lists its files.")


def page(request: Request, found: list[dict[str, object]], *, default: int, most: int) -> Response:
    """Return a page of a list, which is newest first.

    Raises:
        APIError: 400: `limit`, `order` or `after` is wrong.
    """
    limit, order, after = number_of(request, "limit"), request.query_params.get("order", "desc"), None
    limit = default if limit is None else limit
    if not 1 <= limit <= most:
        raise APIError(400, f"limit={limit} is not a number from 1 to {most}.", param="limit")
    if order not in {"asc", "desc"}:
        raise APIError(400, f"order='{order[:40]}' is neither asc nor desc.", param="order")
    found = found if order == "desc" else found[::-1]
    if after := request.query_params.get("after"):
        at = next((number for number, one in enumerate(found) if one["id"] == after), None)
        if at is None:
            raise APIError(400, f"after='{after[:100]}' is none of this list.", param="after")
        found = found[at + 1 :]
    shown = found[:limit]
    ends = {"first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None}
    return _json({"object": "list", "data": shown, "has_more": len(found) > limit, **ends})


def _invalid(name: str, what: str) -> APIError:
    return APIError(400, f"The field '{name}' {what}.", code="invalid_value", param=name)


async def _pieces(file: BinaryIO, size: int) -> AsyncIterator[bytes]:
    with file:
        while size > 0 and (piece := await in_thread(partial(file.read, min(_WRITTEN, size)))):
            size -= len(piece)
            yield piece


def _json(fields: object) -> Response:
    return Response(json.dumps(fields).encode(), media_type=JSON, headers={"cache-control": "no-store"})
