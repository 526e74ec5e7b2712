"""Reads the body of a request: JSON or a form, of a bounded size, decoded piece by piece where it is compressed."""

from __future__ import annotations

import asyncio
import codecs
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import msgspec
from starlette.requests import Request

from service.gateway.metrics import RequestLog
from service.gateway.uploads import Upload, Uploads
from service.in_engine.vllm_service import api_error
from service.in_engine.vllm_service.api_error import APIError, Message, Receive
from service.in_engine.vllm_service.http_contract import ADMIN_BODY_LIMIT, FORM, JSON, header_of

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_DECODED_PIECE = 256 * 1024  # bytes that are decoded between two turns of the event loop: 1 ms of gzip
_WINDOW_LOG_MAX = 23  # 8 MiB, what RFC 9659 allows the coding zstd: a frame may demand memory of this size


class _Stream(Protocol):
    """What the decompressors of zlib and zstd have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


_STREAMS: dict[str, Callable[[], _Stream]] = {
    "gzip": lambda: zlib.decompressobj(wbits=31),
    "deflate": zlib.decompressobj,
    "zstd": lambda: zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG_MAX}),
}


def check_media_type(headers: list[tuple[bytes, bytes]], expected: str = JSON) -> None:
    """Refuse a body that does not call itself JSON, or a form where one is expected.

    vLLM refuses it too, after a wake. A web page can send no `application/json` to another origin without asking it
    first, but forms, plain text and bodies without a type.

    Raises:
        APIError: 415.
    """
    given = header_of(headers, b"content-type")
    if given.partition(";")[0].strip().lower() != expected:
        what = f"Content-Type '{given[:100]}' is not supported" if given else "The request has no Content-Type"
        advice = f"send JSON with 'Content-Type: {JSON}' (curl: -H 'Content-Type: {JSON}')."
        if expected == FORM:
            advice = f"send the recording in a form, '{FORM}' (curl: -F file=@speech.wav -F model=<name>)."
        raise APIError(415, f"{what}; {advice}", code="unsupported_media_type", headers={"Accept": expected})


async def read_object(request: Request, uploads: Uploads) -> dict[str, Any] | None:
    """Return the JSON object that is the body of an operator's request; None: it is none.

    Raises:
        APIError: As `check_media_type` and `read_body`.
    """
    check_media_type(request.scope["headers"])
    state = request.state
    with uploads.track(state.client.name) as upload:
        body = await read_body(ADMIN_BODY_LIMIT, request.scope, request.receive, state.log, upload)
    try:
        fields = msgspec.json.decode(body)  # refuses lone surrogates, which neither pydantic nor a database takes
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


async def read_body(limit: int, scope: Message, receive: Receive, log: RequestLog, upload: Upload) -> bytes | bytearray:
    """Read a body into one buffer, without its content coding and byte order mark.

    Args:
        limit: Bytes that it may have, as it arrives and decoded.
        scope: The request.
        receive: Receives the rest of it.
        log: Gets the size.
        upload: Limits its time, and how much is held of it and others.

    Raises:
        APIError: 400, 408, 413, 415, 429, 503, or 499 when the client left.
    """
    headers = scope["headers"]
    if declared := header_of(headers, b"content-length"):
        api_error.check_length(declared.encode("latin-1"), limit)
    decoder = _decoder(header_of(headers, b"content-encoding"))
    body = await _read(limit, receive, decoder, log, upload)
    if decoder:
        decoder.check_end()
    log.bytes_in = len(body)
    return body[len(codecs.BOM_UTF8) :] if body.startswith(codecs.BOM_UTF8) else body


async def _read(
    limit: int, receive: Receive, decoder: _Decoder | None, log: RequestLog, upload: Upload
) -> bytes | bytearray:
    body = bytearray()  # grows with what arrives: the length that a client declares reserves no memory
    arrived, message = 0, await upload.receive(receive)
    while True:
        if message["type"] == "http.disconnect":
            log.client_left = True
            raise APIError(499, "The client left before its whole body had arrived.", code="client_left")
        piece, more = message.get("body", b""), message.get("more_body", False)
        if not (body or more or decoder):
            upload.hold(len(piece))
            return bytes(piece)
        arrived += len(piece)
        if decoder:
            for decoded in decoder.decode(piece):
                body += decoded
                if len(body) > limit:
                    break
                await asyncio.sleep(0)
        else:
            body += piece
        if max(arrived, len(body)) > limit:
            raise api_error.too_large(limit)
        upload.hold(len(body))
        if not more:
            return body
        message = await upload.receive(receive)


class _Decoder:
    """Decodes a body of one content coding."""

    def __init__(self, coding: str) -> None:
        self._coding, self._stream = coding, _STREAMS[coding]()

    def decode(self, data: bytes) -> Iterator[bytes]:
        """Decode what has arrived, at most `_DECODED_PIECE` bytes at a time.

        Raises:
            APIError: 400: it is not in this coding.
        """
        stream, decoded = self._stream, b""
        while data or (len(decoded) == _DECODED_PIECE and not stream.eof):
            if stream.eof:
                raise self._error(f"goes on after its {self._coding} has ended")
            try:
                decoded = stream.decompress(data, _DECODED_PIECE)
            except (zlib.error, zstd.ZstdError) as error:
                raise self._error(f"is not {self._coding}: {error}") from None
            yield decoded
            data = stream.unused_data or getattr(stream, "unconsumed_tail", b"")  # zstd keeps the rest itself

    def check_end(self) -> None:
        """Refuse a body that ended too soon.

        Raises:
            APIError: 400.
        """
        if not self._stream.eof:
            raise self._error(f"ends before its {self._coding} does")

    def _error(self, what: str) -> APIError:
        advice = f"Send all of it in the Content-Encoding '{self._coding}', or as it is and without that header."
        return APIError(400, f"The body {what}. {advice}", code="invalid_content_encoding")


def _decoder(coding: str) -> _Decoder | None:
    name = coding.strip().lower().removeprefix("x-")  # x-gzip is gzip: RFC 9110, section 8.4.1.3
    if name in {"", "identity"}:
        return None
    if name not in _STREAMS:
        known = ", ".join(_STREAMS)
        raise APIError(
            415,
            f"Content-Encoding '{coding[:100]}' is not supported; send the body as it is, or in one of {known}.",
            code="unsupported_content_encoding",
            headers={"Accept-Encoding": known},
        )
    return _Decoder(name)
