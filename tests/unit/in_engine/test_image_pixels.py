"""Images of every shape that a request may have are measured; Pillow and vLLM are stood in for."""

from __future__ import annotations

import base64
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import pytest
from vllm_service import image_pixels, media_urls
from vllm_service.api_error import APIError

from tests.engine.images import png


class _Image:
    """Pillow's, of a PNG: its size stands in bytes 16 to 23."""

    def __init__(self, data: bytes) -> None:
        self.size = (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"))

    def __enter__(self) -> _Image:
        return self

    def __exit__(self, *_: object) -> None:
        """Close nothing."""


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {
        "pybase64": SimpleNamespace(b64decode=base64.b64decode),
        "PIL": SimpleNamespace(Image=SimpleNamespace(DecompressionBombError=RecursionError)),
        "vllm": ModuleType("vllm"),
        "vllm.multimodal": ModuleType("vllm.multimodal"),
        "vllm.multimodal.image": SimpleNamespace(open_image=lambda file: _Image(file.read())),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def measured(part: dict[str, Any], *, escaped: bool = False) -> int:
    """Return the pixels of a request with this part."""
    body = msgspec.json.encode({"messages": [{"role": "user", "content": [part]}]})
    if escaped:
        body = body.replace(b"data:", b"\\u0064ata:")
    return image_pixels.check(media_urls.check(body, ()))


@pytest.mark.parametrize("escaped", [False, True])
def test_image_of_every_shape_is_measured(escaped: bool) -> None:
    """Of chat and Responses by URL, of Messages by URL and by base64; a letter of `data:` may be escaped."""
    data = png(3, 5)
    url = f"data:image/png;base64,{data}"
    for part in (
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "input_image", "image_url": url},
        {"type": "image", "source": {"type": "url", "url": url}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}},
    ):
        assert measured(part, escaped=escaped) == 15


def test_image_of_an_escaped_url_that_is_too_large_is_refused() -> None:
    """JSON's escapes lead past no bound."""
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(16_384, 8_192)}"}}
    with pytest.raises(APIError) as refused:
        measured(part, escaped=True)
    assert refused.value.code == "image_too_large"
