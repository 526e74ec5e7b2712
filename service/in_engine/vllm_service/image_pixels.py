"""How many pixels the images of a request have, as their headers tell it before vLLM decodes them.

An image of one colour takes 0.2 MB for 64 million pixels, and 0.2 GB once it is decoded; a body of 32 MiB may hold a
hundred of them. vLLM itself bounds the pixels of one image, at 179 million, and refuses it without the field's name.
Images of listed hosts, and the frames of videos, are bounded by vLLM alone, at `IMAGE_PIXELS`: the parent sets it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from .api_error import APIError
from .http_contract import IMAGE_PIXELS
from .media_urls import Medium, has_data, text_of

PIXELS = 1 << 27  # of all images of a request: eleven photographs of 12 million
LARGE_PIXELS = 1 << 24  # from so many on requests are decoded one at a time
_IMAGES = (".image_url", ".source")


def check(media: Sequence[Medium]) -> int:
    """Read the headers of all images, and return how many pixels they have; takes 5 ms for 30 MB of base64.

    Raises:
        APIError: 400; one of them is too large or no image, or all together are too large.
    """
    pixels = 0
    for medium in media:
        if medium.place.endswith(_IMAGES):
            width, height = _size(medium)
            pixels += width * height
            if width * height > IMAGE_PIXELS:
                raise _error(medium, f"has {width} x {height} pixels; an image may have at most {IMAGE_PIXELS}")
            if pixels > PIXELS:
                raise _error(medium, f"and the images before it have {pixels} pixels; at most {PIXELS} are served")
    return pixels


def _size(medium: Medium) -> tuple[int, int]:
    import pybase64
    from PIL import Image
    from vllm.multimodal.image import open_image

    encoded = text_of(medium.raw)
    if has_data(encoded):  # `source` may have a URL too
        spec, _, encoded = encoded.partition(",")
        if not spec.endswith(";base64"):
            raise _invalid(medium, "Its data must be in base64.")
    try:
        with open_image(io.BytesIO(pybase64.b64decode(encoded, validate=True))) as image:
            width, height = image.size
            return width, height
    except Image.DecompressionBombError:
        raise _error(medium, f"has too many pixels; an image may have at most {IMAGE_PIXELS}") from None
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a decoder's, of data that anybody may have made
        raise _invalid(medium, f"Its data are not an image in base64 ({type(error).__name__}).") from None


def _error(medium: Medium, what: str) -> APIError:
    return APIError(400, f"{medium.place} {what}. Send a smaller image.", code="image_too_large", param=medium.param)


def _invalid(medium: Medium, what: str) -> APIError:
    message = f"{medium.place} holds no image. {what} Send it as data:image/png;base64,... or with its format's name."
    return APIError(400, message, code="invalid_image", param=medium.param)
