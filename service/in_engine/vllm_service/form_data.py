"""Forms with a recording, the bodies of the routes of audio: gateway and guard read their fields, and bound them.

A form is read strictly: what two parsers could understand differently is refused, since the gateway chooses a model by
a field that vLLM's own parser reads again. Nothing is copied but short fields. Reading 25 MiB takes 1 ms.

vLLM bounds what a recording decodes to: 600 s, and 256 MiB of samples.
Standard library only: the gateway and the engine both import this.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .api_error import APIError
from .http_contract import FORM, MIB

FILE_LIMIT = 25 * MIB  # bytes of a recording, as OpenAI has it and vLLM by default
FIELD_LIMIT = 64 * 1024  # bytes of every other field
FIELDS = 64  # of one form, the recording included
NAME_LIMIT = 512  # bytes of a model's name
_HEADERS_LIMIT = 2048  # bytes of the headers of one field; vLLM's parser allows 4,096 for each
_FILE = "file"
_BOUNDARY = re.compile(
    r"multipart/form-data[ \t]*;[ \t]*boundary=(\"?)([0-9A-Za-z'()+_,./:=?-]{1,70})\1[ \t]*;?", re.IGNORECASE
)
_NAMED = re.compile(
    rb'form-data; ?name=("?)([A-Za-z0-9_]{1,64}(?:\[[A-Za-z0-9_]{0,64}\])*)\1'
    rb'(; ?filename="[^"\r\n]*"(?:; ?filename\*=[^\s;"]+)?)?;?',  # filename* alone makes no file for vLLM's parser
    re.IGNORECASE,
)
_HEADER = re.compile(rb"([A-Za-z0-9-]+):[ \t]*([^\r\n]*)")
_NUMBER = re.compile(r"[0-9]{1,9}")
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
_SHOWN = 40  # characters of a value


@dataclass(frozen=True)
class Form:
    """What a form has.

    Attributes:
        boundary: Between its fields.
        fields: The texts by their names, of a list the last one.
        model_at: Where the model's name stands in the body; None: it names none.
        text_bytes: Size of all fields but the recording.
    """

    boundary: bytes
    fields: dict[str, str]
    model_at: tuple[int, int] | None
    text_bytes: int

    @property
    def model(self) -> str | None:
        """The model's name."""
        return self.fields.get("model")

    @property
    def stream(self) -> bool | None:
        """Whether the client asks for a stream."""
        text = self.fields.get("stream")
        return None if text is None else _BOOLEANS[text.lower()]

    @property
    def n(self) -> int | None:
        """How many beams the client asks for."""
        return self._number("n")

    @property
    def max_tokens(self) -> int | None:
        """The most tokens of an answer that the client asks for, as far as this is a number."""
        return self._number("max_completion_tokens")

    def _number(self, name: str) -> int | None:
        text = self.fields.get(name, "")
        return int(text) if _NUMBER.fullmatch(text) else None


def read(content_type: str, body: bytes | bytearray, max_n: int) -> Form:
    """Read a form with a recording.

    Args:
        content_type: The request's `Content-Type`.
        body: All of it; it is not kept.
        max_n: The most that `n` may be.

    Raises:
        APIError: 400 or 413: it is no such form, or has too much.
    """
    found = _BOUNDARY.fullmatch(content_type)
    if found is None:
        raise _malformed(f"its Content-Type '{content_type[:100]}' is not '{FORM}; boundary=<boundary>'")
    boundary = found[2].encode()
    fields: dict[str, str] = {}
    model_at, has_file, text_bytes = None, False, 0
    for number, (name, is_file, begin, end) in enumerate(_parts(body, b"--" + boundary)):
        if number == FIELDS:
            raise _malformed(f"it has over {FIELDS} fields")
        if is_file != (name == _FILE):
            raise _invalid(name, "is a file; only 'file' may be one" if is_file else "is a text and no file")
        if (name in fields and not name.endswith("[]")) or (is_file and has_file):
            raise _invalid(name, "is there twice")
        if is_file:
            has_file = True
            if end - begin > FILE_LIMIT:
                message = f"The recording is {end - begin} bytes long; the limit is {FILE_LIMIT // MIB} MiB."
                raise APIError(413, f"{message} Compress it, or send it in pieces.", param=_FILE)
            continue
        fields[name] = _text(name, body, begin, end)
        text_bytes += end - begin
        if name == "model":
            model_at = begin, end
    if not has_file:
        raise _invalid(_FILE, "is missing; send the recording as a file")
    _check_values(fields, max_n)
    return Form(boundary, fields, model_at, text_bytes)


def with_model(body: bytes | bytearray, form: Form, model: str) -> bytes:
    """Return the body with another name of the model, or with one where it had none."""
    if form.model_at is None:
        field = b'--%b\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n' % (form.boundary, model.encode())
        return b"".join((field, body))
    begin, end = form.model_at
    view = memoryview(body)
    return b"".join((view[:begin], model.encode(), view[end:]))


def _parts(body: bytes | bytearray, delimiter: bytes) -> Iterator[tuple[str, bool, int, int]]:
    """Yield each field's name, whether it is a file, and where its value begins and ends."""
    between = b"\r\n" + delimiter
    if not body.startswith(delimiter):
        raise _malformed("it does not begin with its boundary")
    at = len(delimiter)
    while body[at : at + 2] == b"\r\n":
        begin = body.find(b"\r\n\r\n", at, at + _HEADERS_LIMIT) + 4
        if begin < 4:
            raise _malformed(f"a field's headers are over {_HEADERS_LIMIT} bytes long, or do not end")
        name, is_file = _name(bytes(body[at + 2 : begin - 4]))
        end = body.find(between, begin)
        if end < 0:
            raise _malformed(f"'{name}' does not end with the boundary")
        yield name, is_file, begin, end
        at = end + len(between)
    if bytes(body[at : at + 5]) not in {b"--", b"--\r\n"}:
        raise _malformed("a boundary is followed by something else than a field or the end")


def _name(headers: bytes) -> tuple[str, bool]:
    """Return a field's name, and whether it is a file."""
    dispositions = []
    for line in headers.split(b"\r\n"):
        header = _HEADER.fullmatch(line)
        if header is None:
            raise _malformed("a field has an invalid header")
        if header[1].lower() == b"content-disposition":
            dispositions.append(header[2])
    named = _NAMED.fullmatch(dispositions[0]) if len(dispositions) == 1 else None
    if named is None:
        raise _malformed("a field has no Content-Disposition such as 'form-data; name=\"model\"'")
    return named[2].decode(), bool(named[3])


def _text(name: str, body: bytes | bytearray, begin: int, end: int) -> str:
    limit = NAME_LIMIT if name == "model" else FIELD_LIMIT
    if end - begin > limit:
        raise _invalid(name, f"is {end - begin} bytes long; the limit is {limit}")
    try:
        return body[begin:end].decode()
    except UnicodeDecodeError:
        raise _invalid(name, "is not in UTF-8") from None


def _check_values(fields: dict[str, str], max_n: int) -> None:
    if (stream := fields.get("stream")) is not None and stream.lower() not in _BOOLEANS:
        raise _invalid("stream", f"is '{stream[:_SHOWN]}'; write true or false")
    if (n := fields.get("n")) is not None and not (_NUMBER.fullmatch(n) and 1 <= int(n) <= max_n):
        raise _invalid("n", f"is '{n[:_SHOWN]}'; write a whole number from 1 to {max_n}")


def _malformed(what: str) -> APIError:
    message = (
        f"The form cannot be read: {what}. Send '{FORM}' with a file and the field 'model', as OpenAI's clients do."
    )
    return APIError(400, message, code="invalid_form")


def _invalid(name: str, what: str) -> APIError:
    return APIError(400, f"The form's field '{name}' {what}.", code="invalid_value", param=name)
