"""Which media a request may name by URL: data that the URL itself holds, and files of the hosts that the entry lists.

Gateway and guard look before the engine does, on every protocol; `media_connector` looks again at each fetch, in the
engine, and `image_pixels` at what the data are. The fields are those that vLLM reads: of chat `image_url`, `audio_url`,
`video_url`, of Responses `input_image`, of Messages `source`, of scores those of chat. CPU time of a check, which
copies no data: 1 us for a small body without such a field, 30 ms for an image of 30 MB, 11 ms for 10,000 messages.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import NamedTuple, TypeVar

import msgspec

from .api_error import APIError
from .request_counts import SCORED

_T = TypeVar("_T")
_Unread = msgspec.Raw | msgspec.UnsetType  # a view into the body
_FIELDS = ("image_url", "audio_url", "video_url", "file_url", "source")
_MARKS = (b'_url"', b'"source"', b"\\u")  # without one of these there is no such field; names may be escaped
# Nothing that two readers of a URL could understand differently: no user, backslash, blank.
_HTTP = re.compile(r"https?://([a-z0-9.-]+)(?::[0-9]{1,5})?(?:[/?#][^\s\\]*)?", re.IGNORECASE)
_SHOWN = 200  # characters of a URL
MEDIA = 256  # of one request: for each vLLM decodes, scales and hashes, and its default bound is 999


class Medium(NamedTuple):
    """One image, recording or video of a request.

    Attributes:
        place: Where it stands in the body, such as `messages[0].content[1].image_url`.
        raw: Its URL, or for `source` its data in base64: a JSON string that is not decoded.
        is_data: Whether its data are in the request.
    """

    place: str
    raw: msgspec.Raw
    is_data: bool

    @property
    def param(self) -> str:
        """The field of the body."""
        return self.place.partition("[")[0]


class _Message(msgspec.Struct, gc=False):
    """A message, or an item of Responses; the output of a tool has parts too."""

    content: _Unread = msgspec.UNSET
    output: _Unread = msgspec.UNSET


class _Part(msgspec.Struct, gc=False):
    type: _Unread = msgspec.UNSET
    content: _Unread = msgspec.UNSET
    image_url: _Unread = msgspec.UNSET
    audio_url: _Unread = msgspec.UNSET
    video_url: _Unread = msgspec.UNSET
    file_url: _Unread = msgspec.UNSET
    source: _Unread = msgspec.UNSET


class _Named(msgspec.Struct, gc=False):
    url: _Unread = msgspec.UNSET
    data: _Unread = msgspec.UNSET  # of Messages


_WITH_PARTS = sorted({"messages", "input", *(name for names in SCORED.values() for name in names)})
_BODY = msgspec.json.Decoder(msgspec.defstruct("_Body", [(name, _Unread, msgspec.UNSET) for name in _WITH_PARTS]))
_NAMED, _TEXT, _MESSAGE = msgspec.json.Decoder(_Named), msgspec.json.Decoder(str), msgspec.json.Decoder(_Message)
_MESSAGES = msgspec.json.Decoder(list[_Message])
_PARTS, _PART = msgspec.json.Decoder(list[_Part | str]), msgspec.json.Decoder(_Part)
_OBJECTS = re.compile(rb"\{|\[\s*\{")  # not a list of tokens or texts, whose number only the body's size bounds


def check(body: bytes | bytearray, hosts: Collection[str]) -> list[Medium]:
    """Refuse a request that names media elsewhere, or too many; what is no JSON of the right shape is left to others.

    Args:
        body: Of a POST; `request_lists` has bounded its lists.
        hosts: Of which media may be fetched.

    Returns:
        Those whose data the body holds; they are views into it.

    Raises:
        APIError: 400.
    """
    for mark in _MARKS:  # a generator would take longer than the search
        if mark in body:
            break
    else:
        return []
    held, count = [], 0
    fields = _decoded(_BODY, body)
    for name in _WITH_PARTS:
        items = getattr(fields, name, msgspec.UNSET)
        if not (isinstance(items, msgspec.Raw) and _OBJECTS.match(items)):
            continue
        for medium in _media_of_messages(items, name):
            count += 1
            if count > MEDIA:
                message = f"{name} has over {MEDIA} images and other media; at most {MEDIA} are served. Send fewer."
                raise APIError(400, message, code="too_many_media", param=name)
            if medium.is_data:
                held.append(medium)
            elif not is_allowed(url := text_of(medium.raw), hosts):
                raise APIError(
                    400,
                    f"{medium.place} is '{url[:_SHOWN]}'; {explanation(hosts)}",
                    code="media_url_not_allowed",
                    param=name,
                )
    return held


def is_allowed(url: str, hosts: Collection[str]) -> bool:
    """Tell whether a URL is data itself, or on one of the hosts; an empty one is no URL."""
    if not url or has_data(url):
        return True
    found = _HTTP.fullmatch(url)
    return found is not None and found[1].lower() in hosts


def has_data(url: str) -> bool:
    """Tell whether a URL is data itself, as vLLM tells it."""
    return url[:5].lower() == "data:"


def explanation(hosts: Collection[str]) -> str:
    """Return what is allowed."""
    listed = f"only fetches media from {', '.join(hosts)}" if hosts else "fetches no media"
    return f"this model {listed}. Send the media in the request, as a URL that begins with data:."


def _media_of_messages(raw: msgspec.Raw, name: str) -> Iterator[Medium]:
    """Yield those of a list of messages or documents, or of one."""
    if _beginning(raw, 1) == b"{":
        found = {name: _decoded(_MESSAGE, raw)}
    else:
        messages = _decoded(_MESSAGES, raw)
        found = {f"{name}[{index}]": message for index, message in enumerate(messages or ())}
    for place, message in found.items():
        if message is not None:
            yield from _media_of_parts(message.content, f"{place}.content")
            yield from _media_of_parts(message.output, f"{place}.output")


def _media_of_parts(raw: _Unread, place: str, *, within: bool = True) -> Iterator[Medium]:
    """Yield those of one part, or of a list of them; `within`: of their own parts too, which results of tools have."""
    if _beginning(raw, 1) == b"{":
        found = {place: _decoded(_PART, raw)}
    elif _beginning(raw, 1) == b"[":
        parts = _decoded(_PARTS, raw) or []
        found = {f"{place}[{index}]": part for index, part in enumerate(parts) if isinstance(part, _Part)}
    else:
        return
    for where, part in found.items():
        if part is None:
            continue
        for field in _FIELDS:
            value = getattr(part, field)
            if value is not msgspec.UNSET:
                yield from _media_of_field(value, f"{where}.{field}", part)
        if within and part.content is not msgspec.UNSET:
            yield from _media_of_parts(part.content, f"{where}.content", within=False)


def _media_of_field(value: msgspec.Raw, place: str, part: _Part) -> Iterator[Medium]:
    """Yield what a field names by its text, or by the `url` or `data` of its object."""
    url: _Unread = value
    if _beginning(value, 1) == b"{" and (named := _decoded(_NAMED, value)):
        url = named.url
        if isinstance(named.data, msgspec.Raw) and _decoded(_TEXT, part.type) == "image":
            yield Medium(place, named.data, is_data=True)
    if isinstance(url, msgspec.Raw) and _beginning(url, 1) == b'"':
        # Most data are known without decoding them; a letter may be escaped. vLLM strips nothing before it looks.
        is_data = _beginning(url, 6).lower() == b'"data:' or has_data(text_of(url))
        yield Medium(place, url, is_data)


def text_of(raw: msgspec.Raw) -> str:
    """Return the text of a JSON string."""
    return _decoded(_TEXT, raw) or ""


def _beginning(raw: _Unread, length: int) -> bytes:
    return bytes(memoryview(raw)[:length]) if isinstance(raw, msgspec.Raw) else b""


def _decoded(decoder: msgspec.json.Decoder[_T], raw: _Unread | bytes | bytearray) -> _T | None:
    """Return what JSON holds; None where it is absent or of another shape."""
    try:
        return None if isinstance(raw, msgspec.UnsetType) else decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
