"""Which URLs of media a body may have, on every protocol and in every shape that vLLM reads."""

from __future__ import annotations

import json
from typing import Any

import pytest
from vllm_service import media_urls
from vllm_service.api_error import APIError

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
URL = "http://evil.example/a.png"
DATA = "data:image/png;base64,AAAA"
HOSTS = ("cdn.example",)


def chat(part: object) -> dict[str, Any]:
    """Return the body of a chat with this part."""
    return {"messages": [{"role": "user", "content": "hi"}, {"role": "user", "content": ["so", part]}]}


def parts(url: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Return every way to name a URL: the route, the place, and the body."""
    image = {"type": "image", "source": {"type": "url", "url": url}}
    shot = {"type": "computer_screenshot", "image_url": url}
    asked = {"type": "message", "role": "user", "content": [{"type": "input_image", "image_url": url}]}
    found = [
        (CHAT, f"messages[1].content[1].{kind}_url", chat({"type": f"{kind}_url", f"{kind}_url": value}))
        for kind in ("image", "audio", "video")
        for value in (url, {"url": url})
    ]
    found += [(CHAT, "messages[1].content[1].image_url", chat({"image_url": url, "uuid": "1"}))]
    found += [
        (path, f"{name}[0].content[0].image_url", {name: [{"role": "user", "content": [{"image_url": {"url": url}}]}]})
        for path, name in (("/tokenize", "messages"), ("/v1/embeddings", "messages"), ("/v1/embeddings", "input"))
    ]
    found += [
        (RESPONSES, "input[0].content[0].image_url", {"input": [asked]}),
        (RESPONSES, "input[0].content[0].file_url", {"input": [{"role": "user", "content": [{"file_url": url}]}]}),
        (RESPONSES, "input[0].output.image_url", {"input": [{"type": "computer_call_output", "output": shot}]}),
        (RESPONSES, "input[0].output[0].image_url", {"input": [{"type": "function_call_output", "output": [shot]}]}),
    ]
    for path in (MESSAGES, f"{MESSAGES}/count_tokens"):
        result = {"type": "tool_result", "content": [{"type": "text", "text": "x"}, image]}
        found += [
            (path, "messages[0].content[0].source", {"messages": [{"role": "user", "content": [image]}]}),
            (path, "messages[0].content[0].content[1].source", {"messages": [{"role": "user", "content": [result]}]}),
        ]
    return found


@pytest.mark.parametrize(
    ("place", "body"), [case[1:] for case in parts(URL)], ids=[" ".join(c[:2]) for c in parts(URL)]
)
def test_media_url_is_refused_in_every_shape(place: str, body: dict[str, Any]) -> None:
    """With the place, the URL and what to send; escaped names too."""
    escaped = json.dumps(body).replace("_url", "\\u005furl").replace("source", "\\u0073ource")
    for sent in (json.dumps(body), json.dumps(body, indent=1), escaped):
        for hosts in ((), HOSTS):
            with pytest.raises(APIError) as refused:
                media_urls.check(sent.encode(), hosts)
            error = refused.value
            assert (error.status, error.code, error.param) == (400, "media_url_not_allowed", place.partition("[")[0])
            assert error.message.startswith(f"{place} is '{URL}'; this model ")
            assert "data:" in error.message


@pytest.mark.parametrize("url", [DATA, "https://cdn.example/a.png", "HTTP://CDN.example:8080/a", "", "DATA:,x"])
def test_media_url_of_data_or_of_a_listed_host_passes(url: str) -> None:
    """On every protocol."""
    for _, _, body in parts(url):
        media_urls.check(json.dumps(body).encode(), HOSTS)


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "FILE:///etc/passwd", "/etc/passwd", "ftp://cdn.example/a", "gopher://cdn.example/a"),
        *("http://cdn.example.evil.example/a", "http://cdn.example@evil.example/a", "http://evil.example#cdn.example"),
        *("http://127.0.0.1/a", "http://[::1]/a", "http://2130706433/", "http://169.254.169.254/latest", "http:///a"),
        *(
            "http://[cdn.example/a",
            " http://evil.example/a",
            "s3://cdn.example/a",
            "http://evil.example\\@cdn.example/",
        ),
    ],
)
def test_media_url_elsewhere_is_refused_where_a_host_is_listed(url: str) -> None:
    """Files, other schemes, addresses, and hosts that only look like the listed one."""
    with pytest.raises(APIError):
        media_urls.check(json.dumps(chat({"type": "image_url", "image_url": {"url": url}})).encode(), HOSTS)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": f'read "image_url": "{URL}" and {{"source": "{URL}"}}'}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": f'"image_url":"{URL}"'}]}]},
        {"messages": [], "tools": [{"function": {"parameters": {"default": {"image_url": URL, "source": URL}}}}]},
        {"input": ["image_url", URL, '"image_url"']},
        {"input": [1, 2], "user": '"source"'},
        {"messages": "image_url", "input": '"image_url"'},
        {"messages": [[{"image_url": URL}], 3, None], "x": '"image_url"'},
    ],
)
def test_media_url_in_a_text_is_no_media(body: dict[str, Any]) -> None:
    """What people write about URLs is theirs; lists of the wrong shape are judged by others."""
    media_urls.check(json.dumps(body).encode(), ())


def test_media_url_check_leaves_what_is_no_json_to_others() -> None:
    """Truncated, not UTF-8, deep."""
    for body in (b"", b'{"image_url":', b'\xff"image_url"', b'{"messages": ' + b"[" * 100_000 + b'"_url"', b'"_url"'):
        media_urls.check(body, ())


def test_media_whose_data_the_body_holds_are_returned_with_their_places() -> None:
    """On every protocol, escaped too; of an object with `data` too, where vLLM takes it for an image."""
    for _, place, body in parts(DATA):
        (medium,) = media_urls.check(json.dumps(body).encode(), ())
        assert (medium.place, media_urls.text_of(medium.raw)) == (place, DATA)
        assert medium.param == place.partition("[")[0]
        escaped = json.dumps(body).replace("data:", "\\u0064ata:")
        assert media_urls.check(escaped.encode(), ())[0].is_data
    source = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
    for kind, texts in (("image", ["AAAA"]), ("document", [])):
        body = chat({"type": "tool_result", "content": [{"type": kind, "source": source}]})
        assert [media_urls.text_of(one.raw) for one in media_urls.check(json.dumps(body).encode(), ())] == texts


@pytest.mark.parametrize("url", [DATA, "https://cdn.example/a.png"])
def test_media_over_their_number_are_refused(url: str) -> None:
    """Of all messages together."""
    image = {"type": "image_url", "image_url": {"url": url}}
    for count, over in ((media_urls.MEDIA - 1, False), (media_urls.MEDIA, True)):
        body = {"messages": [{"role": "user", "content": [image] * count}, {"role": "user", "content": [image]}]}
        if over:
            with pytest.raises(APIError, match="has over 256 images") as refused:
                media_urls.check(json.dumps(body).encode(), HOSTS)
            assert (refused.value.status, refused.value.code, refused.value.param) == (
                400, "too_many_media", "messages"
            )  # fmt: skip
        else:
            media_urls.check(json.dumps(body).encode(), HOSTS)
