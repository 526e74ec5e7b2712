"""Keys of the gateway before a real engine: who has none gets nothing but the open pages, and no key shows anywhere."""

from __future__ import annotations

import json

import pytest
import requests

from tests.engine.dialogues import dialogue
from tests.engine.routes import ALLOWED, KNOWN, ask, error_of
from tests.engine.running import Service

from .clients import DEFAULT_KEY, KEY, OTHER_KEY

# as `served` takes them: two by name, and one that stands alone in API_KEY
KEYS = {"clients": KEY, "other": OTHER_KEY, "default": DEFAULT_KEY}


def chat_with(service: Service, **headers: str) -> requests.Response:
    """Post a chat with these headers."""
    body = {"model": "llm", **dialogue("capital").request}
    return requests.post(f"{service.url}/v1/chat/completions", json=body, headers=headers, timeout=60)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer "},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": KEY},
        {"x-api-key": "wrong"},
        {"x-api-key": ""},
        {"Authorization": f"Bearer {KEY}x"},
    ],
    ids=["none", "wrong", "empty", "basic", "bare", "wrong x-api-key", "empty x-api-key", "longer"],
)
def test_keys_without_a_right_one_401(served: Service, headers: dict[str, str]) -> None:
    """No key or a wrong one is 401 in OpenAI's shape, says how to send one, and does not repeat the key."""
    refused = chat_with(served, **headers)
    assert refused.status_code == 401
    assert refused.headers["WWW-Authenticate"] == "Bearer"
    assert error_of(refused.content)["code"] == "invalid_api_key"
    assert not any(key in refused.text for key in KEYS.values())


@pytest.mark.parametrize("name", KEYS)
def test_keys_right_one_is_answered(served: Service, name: str) -> None:
    """Every key is accepted, as Bearer and as x-api-key."""
    for headers in ({"Authorization": f"Bearer {KEYS[name]}"}, {"x-api-key": KEYS[name]}):
        answer = chat_with(served, **headers)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"].strip() == dialogue("capital").content


def test_keys_open_pages_need_none_and_all_others_do(served: Service) -> None:
    """Health and the description are open; every other listed route needs a key, metrics and tokens too."""
    opened = {"/health", "/docs", "/openapi.json"}
    for path, methods in ALLOWED.items():
        for method in methods:
            status, _ = ask(served, method, path.format(response_id="resp_1"))
            assert status == (200 if path in opened else 401), f"{method} {path}: {status}"


def test_keys_off_the_list_is_404_even_with_one(served: Service) -> None:
    """A key opens listed routes only."""
    for path in KNOWN:
        assert ask(served, "POST", path, b"{}", Authorization=f"Bearer {KEY}")[0] == 404, path


def test_keys_stand_nowhere_but_in_the_parents_environment(served: Service) -> None:
    """No process of the engine has a key in its arguments or environment, and no output has one."""
    processes = served.engine()
    assert len(processes) >= 2
    for process in processes:
        seen = " ".join(process.cmdline()) + json.dumps(process.environ())
        assert not any(key in seen for key in KEYS.values()), process
    said = served.out + served.err + served.log_file.read_text()
    assert not any(key in said for key in KEYS.values())
