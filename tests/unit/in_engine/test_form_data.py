"""Forms with a recording: what they may have, and that nothing in them could be read in two ways."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

from service.in_engine.vllm_service.api_error import APIError
from service.in_engine.vllm_service.form_data import FIELD_LIMIT, FIELDS, FILE_LIMIT, NAME_LIMIT, read, with_model

TYPE = "multipart/form-data; boundary=b-1"
FILE = 'form-data; name="file"; filename="speech.wav"', b"RIFF\r\n--b"


def field(name: str, value: str | bytes) -> tuple[str, bytes]:
    """Return a field of text."""
    return f'form-data; name="{name}"', value if isinstance(value, bytes) else value.encode()


def form(*fields: tuple[str, bytes], end: bytes = b"--\r\n") -> bytes:
    """Return a form of these fields, each with its Content-Disposition."""
    parts = (b"--b-1\r\nContent-Disposition: %b\r\n\r\n%b\r\n" % (head.encode(), value) for head, value in fields)
    return b"".join(parts) + b"--b-1" + end


def refused(body: bytes, content_type: str = TYPE) -> APIError:
    """Return why a form is refused."""
    with pytest.raises(APIError) as error:
        read(content_type, body, 16)
    return error.value


@pytest.mark.parametrize(
    "content_type",
    [TYPE, 'Multipart/Form-Data;boundary="b-1"', "multipart/form-data; boundary=b-1;"],
)
def test_form_is_read(content_type: str) -> None:
    """Fields in any order, of lists too, with the names of OpenAI's clients; headers may be in any case."""
    body = form(
        field("model", "tiny"),
        field("stream", "true"),
        field("timestamp_granularities[]", "word"),
        field("timestamp_granularities[]", "segment"),
        FILE,
        field("max_completion_tokens", "8"),
        field("chunking_strategy[type]", "server_vad"),
        field("prompt", ""),
        field("n", "2"),
    ).replace(b"Content-Disposition", b"content-disposition", 2)

    found = read(content_type, bytearray(body), 16)

    assert found == read(content_type, body, 16)
    assert (found.model, found.stream, found.n, found.max_tokens) == ("tiny", True, 2, 8)
    assert found.fields["prompt"] == ""
    assert found.text_bytes < 60


@pytest.mark.parametrize(
    "head",
    [
        'form-data; name="file"; filename="a; b.wav"',
        "form-data; name=file; filename=\"a.wav\"; filename*=UTF-8''%e2%82%ac.wav",
        FILE[0] + ";",
    ],
)
def test_form_file_may_have_any_name(head: str) -> None:
    """Of which the service makes no use."""
    assert read(TYPE, form((head, b"x")), 16).model is None


def test_form_file_with_an_encoded_name_alone_is_refused() -> None:
    """For vLLM's parser such a field is a text."""
    head = "form-data; name=file; filename*=UTF-8''%e2%82%ac.wav"
    assert refused(form((head, b"x"))).code == "invalid_form"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (form(field("model", "tiny")), "file"),
        (form(FILE, FILE), "file"),
        (form(field("file", "x")), "file"),
        (form(FILE, ('form-data; name="more"; filename="x"', b"")), "more"),
        (form(FILE, field("model", "a"), field("model", "b")), "model"),
        (form(FILE, field("model", b"\xff")), "model"),
        (form(FILE, field("model", "x" * (NAME_LIMIT + 1))), "model"),
        (form(FILE, field("prompt", "x" * (FIELD_LIMIT + 1))), "prompt"),
        (form(FILE, field("stream", "maybe")), "stream"),
        (form(FILE, field("n", "17")), "n"),
        (form(FILE, field("n", "0")), "n"),
        (form(FILE, field("n", "9" * 5000)), "n"),
    ],
)
def test_form_field_that_is_wrong_is_named(body: bytes, param: str) -> None:
    """What the gateway reads of it, and what would be too much for the engine."""
    error = refused(body)
    assert (error.status, error.code, error.param) == (400, "invalid_value", param)
    assert param in error.message
    assert len(error.message) < 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"\r\n" + form(FILE),
        form(FILE, end=b""),
        form(FILE, end=b"--\r\nmore"),
        form(FILE, end=b"\r\n"),
        form(FILE, end=b" --\r\n"),
        form(FILE)[:40],
        form(FILE).replace(b"RIFF", b"RIFF\r\n--b-1x"),
        form(FILE, *(field(f"x{number}", "") for number in range(FIELDS))),
        form(("form-data", b"x"), FILE),
        form(("attachment; name=x", b"x"), FILE),
        form(('form-data; name="a b"', b"x"), FILE),
        form(('form-data; name="model', b"x"), FILE),
        form(('form-data; name=model"', b"x"), FILE),
        form(('form-data; name="file; filename="; name=model; x="', b"x"), FILE),
        form(('form-data; name="x"; name="model"', b"x"), FILE),
        form(("form-data; name=\"model\"; name*=utf-8''x", b"x"), FILE),
        form(('form-data; name="x"\r\nContent-Disposition: form-data; name="model"', b"x"), FILE),
        form(('form-data; name="x"\r\n folded: x', b"x"), FILE),
        form(('form-data; name="x"\r\nX: ' + "x" * 4096, b"x"), FILE),
    ],
)  # fmt: skip
def test_form_that_two_parsers_could_read_differently_is_refused(body: bytes) -> None:
    """The gateway chooses a model by what vLLM's own parser reads again."""
    error = refused(body)
    assert (error.status, error.code) == (400, "invalid_form")


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=b-1; charset=utf-16",
        "multipart/form-data; charset=utf-16; boundary=b-1",
        "multipart/form-data; boundary=b-1, multipart/form-data; boundary=x",
        "multipart/form-data; boundary=" + "x" * 71,
    ],
)
def test_form_with_another_content_type_is_refused(content_type: str) -> None:
    """A character set would change what a name means."""
    assert refused(form(FILE), content_type).code == "invalid_form"


def test_form_recording_over_the_limit_is_413() -> None:
    """The body may be larger than the recording, which is bounded by itself."""
    error = refused(form(field("model", "x"), (FILE[0], bytes(FILE_LIMIT + 1))))
    assert (error.status, error.param) == (413, "file")
    assert "25 MiB" in error.message


@pytest.mark.parametrize("others", [[field("model", "an-alias")], []])
def test_form_gets_another_model(others: Sequence[tuple[str, bytes]]) -> None:
    """In the place of the name that it had, or before its first field."""
    body = form(FILE, *others, field("language", "en"))

    changed = with_model(body, read(TYPE, body, 16), "tiny")

    assert read(TYPE, changed, 16).fields == {"model": "tiny", "language": "en"}
    assert FILE[1] in changed


@pytest.mark.parametrize("filling", [b"\r\n--b-", b"\r", b"\0"])
def test_form_of_25_mib_is_read_within_a_moment(filling: bytes) -> None:
    """Whatever the recording is filled with, such as beginnings of the boundary."""
    body = form((FILE[0], filling * (FILE_LIMIT // len(filling))))
    began = time.process_time()
    read(TYPE, body, 16)
    assert time.process_time() - began < 1.0
