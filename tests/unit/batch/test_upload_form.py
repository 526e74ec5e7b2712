"""Forms with a file, in pieces of any size."""

from __future__ import annotations

import pytest

from service.batch.upload_form import UploadForm
from service.in_engine.vllm_service.api_error import APIError

TYPE = "multipart/form-data; boundary=b-1"
CONTENT = b'{"a": 1}\r\n--b-\r\n\r\n--b\n'  # nearly a boundary
FIRST = b'--b-1\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
FILE = (
    b'--b-1\r\nContent-Type: text/plain\r\ncontent-disposition: form-data; name="file"; filename="in \\"1\\".jsonl"'
    b"\r\n\r\n" + CONTENT + b"\r\n"
)
END = b"--b-1--\r\n"


def fed(body: bytes, size: int, content_type: str = TYPE) -> tuple[UploadForm, bytes]:
    """Return a form that got a body in pieces of a size, and its file."""
    written: list[bytes] = []
    form = UploadForm(content_type, written.append)
    for at in range(0, len(body), size):
        form.feed(body[at : at + size])
    return form, b"".join(written)


@pytest.mark.parametrize("size", [*range(1, 80), 10_000])
@pytest.mark.parametrize("parts", [(FIRST, FILE), (FILE, FIRST)], ids=["file last", "file first"])
def test_file_is_the_same_in_pieces_of_any_size(parts: tuple[bytes, bytes], size: int) -> None:
    """Python's client sends the file last, JavaScript's may send it first."""
    form, content = fed(b"".join(parts) + END, size)

    assert form.is_complete
    assert content == CONTENT
    assert form.fields == {"purpose": "batch"}
    assert form.filename == 'in \\"1\\".jsonl'


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data; charset=utf-8; boundary=b-1",
        'Multipart/Form-Data;boundary="b-1"; charset="utf-8"',
        "multipart/form-data ; boundary=b-1 ;",
    ],
)
def test_parameters_may_come_in_any_order(content_type: str) -> None:
    """As some clients have them: those of the form, and those of a field."""
    file = FILE.replace(b'name="file"; filename="in \\"1\\".jsonl"', b'filename="in; name=x.jsonl"; x=y; name=file')
    assert file != FILE
    form, content = fed(FIRST + file + END, 100, content_type)
    assert form.is_complete
    assert content == CONTENT
    assert (form.filename, form.fields) == ("in; name=x.jsonl", {"purpose": "batch"})


def test_form_that_breaks_off_is_not_complete() -> None:
    """Wherever."""
    body = FIRST + FILE + END
    assert not any(fed(body[:end], 7)[0].is_complete for end in range(len(body) - 2 - len(b"--")))


@pytest.mark.parametrize(
    ("body", "content_type", "named"),
    [
        (FIRST, "application/json", "Content-Type"),
        (FIRST, "multipart/form-data", "Content-Type"),
        (FIRST, "multipart/form-data; boundary=b-1; boundary=b-2", "Content-Type"),
        (FIRST, "multipart/form-data; boundary=b-1 x", "Content-Type"),
        (FIRST, "multipart/form-data" + "; a=b" * 200 + "; boundary=b-1", "Content-Type"),
        (FIRST.replace(b'"purpose"', b'"purpose"; name="file"'), TYPE, "no Content-Disposition"),
        (FIRST.replace(b"\r\n\r\n", b"\r\n" + FIRST[7:52] + b"\r\n\r\n", 1), TYPE, "no Content-Disposition"),
        (b"x" + FIRST, TYPE, "does not begin"),
        (b"x" * 5000, TYPE, "does not begin"),
        (b"--b-1\r\nx: y\r\n\r\n", TYPE, "no Content-Disposition"),
        (b"--b-1x\r\n\r\n", TYPE, "no Content-Disposition"),
        (b"--b-1\r\n" + b"x" * 5000, TYPE, "headers are longer"),
        (FIRST + FIRST, TYPE, "twice"),
        (FILE + FILE, TYPE, "twice"),
        (FILE.replace(b'"file"', b'"purpose"'), TYPE, "only 'file'"),
        (FIRST.replace(b"batch", b"x" * 5000), TYPE, "longer than"),
    ],
)
def test_form_that_is_wrong_is_refused(body: bytes, content_type: str, named: str) -> None:
    """400, as soon as that can be seen."""
    with pytest.raises(APIError, match=named) as refused:
        fed(body, 100, content_type)
    assert refused.value.status == 400
