"""Reads a form with one file as it arrives: the file goes to the disk piece by piece, the other fields are short.

The form is read strictly, as OpenAI's clients and browsers write it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from service.in_engine.vllm_service.api_error import APIError

FIELD_LIMIT = 4096  # bytes of a field that is no file
_FIELDS = 16
_HEADERS_LIMIT = 4096
_CONTENT_TYPE_LIMIT = 512
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,./:=?-]{1,70}")
_NAME = re.compile(rb"[A-Za-z0-9_\[\]]{1,64}")
_FORM = re.compile(rb"multipart/form-data[ \t]*", re.IGNORECASE)
_DISPOSITION = re.compile(rb"\r\ncontent-disposition:[ \t]*form-data[ \t]*", re.IGNORECASE)
_PARAMETER = re.compile(rb';[ \t]*(?:([^\s;="]{1,64})=(?:"((?:[^"\\\r\n]|\\.)*)"|([^\s;"]*))[ \t]*)?')


class UploadForm:
    """A form that arrives.

    Args:
        content_type: The request's `Content-Type`.
        write: Takes the pieces of the file.

    Attributes:
        fields: The short fields that have arrived.
        filename: Of the file; None: it has not come yet.
        is_complete: The end of the form has arrived.

    Raises:
        APIError: 400: that is no form.
    """

    def __init__(self, content_type: str, write: Callable[[bytes], None]) -> None:
        given = content_type.encode() if len(content_type) <= _CONTENT_TYPE_LIMIT else b""
        form = _FORM.match(given)
        boundary = _parameters(given, form.end()).get(b"boundary", b"") if form else b""
        if not _BOUNDARY.fullmatch(boundary):
            raise _malformed(
                f"its Content-Type '{content_type[:100]}' is not 'multipart/form-data; boundary=<boundary>'"
            )
        self._between = b"\r\n--" + boundary
        self._write = write
        self._waiting = bytearray(b"\r\n")  # so that the first boundary is like the others
        self._field: str | None = None  # the field whose value arrives
        self._value = bytearray()
        self._is_file = self._is_begun = self.is_complete = False
        self.fields: dict[str, str] = {}
        self.filename: str | None = None

    def feed(self, piece: bytes) -> None:
        """Take a piece of the body.

        Raises:
            APIError: 400: it is no such form.
        """
        self._waiting += piece
        while not self.is_complete and self._step():
            pass
        if self.is_complete:
            self._waiting.clear()

    def _step(self) -> bool:
        return self._value_step() if self._field or not self._is_begun else self._headers_step()

    def _value_step(self) -> bool:
        """Take what has arrived of a value, or before the first boundary; tell whether more can be read."""
        at = self._waiting.find(self._between)
        end = at if at >= 0 else max(0, len(self._waiting) - len(self._between) + 1)
        if not self._is_begun:
            if end:
                raise _malformed("it does not begin with its boundary")
        else:
            self._take(bytes(memoryview(self._waiting)[:end]))
        if at < 0:
            del self._waiting[:end]
            return False
        del self._waiting[: at + len(self._between)]
        if self._field:
            self._end_field()
        self._is_begun, self._field = True, None
        return True

    def _headers_step(self) -> bool:
        if self._waiting[:2] == b"--":
            self.is_complete = True
            return False
        end = self._waiting.find(b"\r\n\r\n")
        if end < 0:
            if len(self._waiting) > _HEADERS_LIMIT:
                raise _malformed(f"a field's headers are longer than {_HEADERS_LIMIT} bytes")
            return False
        headers = bytes(self._waiting[:end])
        del self._waiting[: end + 4]
        found = [*_DISPOSITION.finditer(headers)]
        parameters = _parameters(headers, found[0].end()) if len(found) == 1 else {}
        name = _NAME.fullmatch(parameters.get(b"name", b""))
        if not headers.startswith(b"\r\n") or name is None:
            raise _malformed("a field has no Content-Disposition such as 'form-data; name=\"purpose\"'")
        self._field = name[0].decode()
        self._is_file = any(one.startswith(b"filename") for one in parameters)
        if self._field in self.fields or (self._is_file and self.filename is not None) or len(self.fields) >= _FIELDS:
            raise _malformed(f"it has '{self._field}' twice, or more than {_FIELDS} fields")
        if self._is_file:
            if self._field != "file":
                raise _malformed(f"'{self._field}' is a file; only 'file' may be one")
            self.filename = parameters.get(b"filename", b"").decode(errors="replace")
        return True

    def _take(self, piece: bytes) -> None:
        if self._is_file:
            if piece:
                self._write(piece)
            return
        self._value += piece
        if len(self._value) > FIELD_LIMIT:
            raise _malformed(f"'{self._field}' is longer than {FIELD_LIMIT} bytes")

    def _end_field(self) -> None:
        if not self._is_file and self._field:
            self.fields[self._field] = self._value.decode(errors="replace")
        self._value.clear()


def _parameters(header: bytes, at: int) -> dict[bytes, bytes]:
    """Return the parameters of a header's value from there on; none where one is wrong or there twice."""
    parameters: dict[bytes, bytes] = {}
    while found := _PARAMETER.match(header, at):
        at, name = found.end(), (found[1] or b"").lower()
        if name in parameters:
            return {}
        if name:
            parameters[name] = found[3] if found[2] is None else found[2]
    return parameters if at == len(header) or header.startswith(b"\r\n", at) else {}


def _malformed(what: str) -> APIError:
    message = f"The form cannot be read: {what}. Send 'multipart/form-data' with 'file' and 'purpose=batch'."
    return APIError(400, message, code="invalid_form")
