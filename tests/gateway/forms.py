"""Forms with a recording, as clients of the routes of audio send them."""

from __future__ import annotations

from collections.abc import Mapping

BOUNDARY = "form-of-a-test"
CONTENT_TYPE = f"multipart/form-data; boundary={BOUNDARY}"
RECORDING = b"RIFF\r\n--form-of\0\xff"


def form(fields: Mapping[str, object], recording: bytes = RECORDING) -> bytes:
    """Return a form of these fields, texts as Python writes them, and then the recording."""
    texts = "".join(
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields.items()
    )
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    begin = f"{texts}{head}".encode(errors="surrogatepass")
    return b"".join((begin, recording, f"\r\n--{BOUNDARY}--\r\n".encode()))
