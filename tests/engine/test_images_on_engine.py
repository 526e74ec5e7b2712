"""Images as `data:` URLs, sent to the real engine behind its guard: what would be too large is refused undecoded."""

from __future__ import annotations

import time
from typing import Any

import pytest

from service.in_engine.vllm_service.http_contract import MIB

from .guarded import Guarded
from .images import png
from .test_request_lists_on_engine import CHAT, CPU_S, MESSAGES, RESPONSES, post, used

SIDE = 8192  # of the largest image that is served
GROWTH = 64 * MIB  # decoded it takes 192 MiB


LARGE, LARGEST, SMALL = png(SIDE, SIDE + 1), png(SIDE, SIDE), png(2, 2)


def bodies(images: list[str], media_type: str = "image/png") -> list[tuple[str, str, dict[str, Any]]]:
    """Return every way to send these images: the route, the place of the last, and the fields."""
    last, urls = len(images) - 1, [f"data:{media_type};base64,{image}" for image in images]
    asked = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    inputs = [{"type": "input_image", "image_url": url} for url in urls]
    sources = [{"type": "base64", "media_type": media_type, "data": image} for image in images]
    blocks = [{"type": "image", "source": source} for source in sources]
    result = {"type": "tool_result", "tool_use_id": "1", "content": blocks}

    def user(content: object) -> list[dict[str, Any]]:
        return [{"role": "user", "content": content}]

    return [
        (CHAT, f"messages[0].content[{last}].image_url", {"messages": user(asked)}),
        (RESPONSES, f"input[0].content[{last}].image_url", {"input": user(inputs)}),
        (MESSAGES, f"messages[0].content[{last}].source", {"messages": user(blocks)}),
        (MESSAGES, f"messages[0].content[0].content[{last}].source", {"messages": user([result])}),
    ]


@pytest.mark.parametrize("images", [[LARGE], [LARGEST, LARGEST, SMALL]], ids=["one", "all"])
def test_images_of_too_many_pixels_are_400_with_the_field_and_are_not_decoded(
    generating: Guarded, images: list[str]
) -> None:
    """0.1 MB of base64 each, on every protocol."""
    before_s, before = used(generating)
    for path, place, fields in bodies(images):
        answer = post(generating, path, **fields)
        error = answer.json()["error"]

        assert answer.status_code == 400, answer.text
        assert error["message"].startswith(f"{place} "), error
        assert "pixels" in error["message"]
        if path != MESSAGES:
            assert (error["code"], error["param"]) == ("image_too_large", place.partition("[")[0])
    after_s, after = used(generating)
    assert after_s - before_s < CPU_S
    assert after - before < GROWTH


@pytest.mark.parametrize("data", ["AAAA", "no base64!", LARGEST[:40], ""])
def test_image_that_cannot_be_read_is_400_with_the_field(generating: Guarded, data: str) -> None:
    """Neither a 500 nor an error that does not say which of them."""
    for path, place, fields in bodies([SMALL, data]):
        answer = post(generating, path, **fields)

        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["message"].startswith(f"{place} holds no image"), answer.text


def test_image_in_another_encoding_is_400_with_the_field(generating: Guarded) -> None:
    """VLLM reads base64 alone."""
    image = {"type": "image_url", "image_url": {"url": "data:image/svg+xml,<svg/>"}}
    answer = post(generating, CHAT, messages=[{"role": "user", "content": [image]}])

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_image")


def test_image_within_the_bounds_reaches_the_engine(generating: Guarded) -> None:
    """Which has no eyes, and says so itself."""
    for path, _, fields in bodies([LARGEST]):
        began = time.monotonic()
        answer = post(generating, path, **fields)

        assert answer.status_code == 400, answer.text
        assert "multimodal" in answer.text, answer.text
        assert time.monotonic() - began < 15
