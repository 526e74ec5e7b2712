"""Keys of the gateway before a real engine: who has none gets nothing but the open pages, and no key shows anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import requests

from service.engine import environment
from tests.engine.dialogues import dialogue
from tests.engine.routes import ALLOWED, KNOWN, ask, error_of
from tests.engine.running import CANARY, FOREIGN, Service, serving, wait_until

KEY, OTHER_KEY, DEFAULT_KEY = "sk-of-the-clients-3f9a", "sk-of-somebody-else", "sk-of-nobody-by-name-0b5e"
MEASURED_KEY = "sk-whose-usage-is-measured"
KEYS = {"clients": KEY, "other": OTHER_KEY, "default": DEFAULT_KEY}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The tiny model behind keys: two by name, and one that stands alone in API_KEY."""
    environment.ensure()
    keys = {"API_KEYS": f"clients={KEY},other={OTHER_KEY},measured={MEASURED_KEY}", "API_KEY": DEFAULT_KEY}
    keys["API_LIMITS"] = '{"other": {"concurrency": 100}}'
    with serving(tmp_path_factory.mktemp("served"), "tiny", **keys, **FOREIGN) as service:
        yield service


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
    """Every key is accepted: as Bearer, as x-api-key beside an old session's Bearer, and as api-key."""
    key = KEYS[name]
    for headers in (
        {"Authorization": f"Bearer {key}"},
        {"Authorization": "Bearer stale", "x-api-key": key},
        {"api-key": key},
    ):
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


def test_keys_and_foreign_variables_reach_no_process_of_the_engine(served: Service) -> None:
    """None has a key in its arguments or environment, nor a secret of the user's shell; and no output has a key."""
    processes = served.engine()
    assert len(processes) >= 2
    for process in processes:
        environ = process.environ()
        seen = " ".join(process.cmdline()) + json.dumps(environ)
        assert not any(key in seen for key in (*KEYS.values(), CANARY)), process
        assert not ({"API_KEY", "API_KEYS", "API_LIMITS", *FOREIGN} & set(environ)), process
    said = served.out + served.err + served.log_file.read_text()
    assert not any(key in said for key in KEYS.values())


def usage_of(service: Service, requests_made: int) -> dict[str, int]:
    """Return the usage of the measured key, once the ledger has its requests."""
    headers = {"Authorization": f"Bearer {MEASURED_KEY}"}
    found: dict[str, int] = {}

    def is_there() -> bool:
        found.update(
            next(iter(requests.get(f"{service.url}/v1/usage", headers=headers, timeout=60).json()["data"]), {})
        )
        return found.get("requests") == requests_made

    wait_until(is_there, 20)
    return found


def test_usage_has_the_tokens_of_every_protocol_and_of_clients_that_left(served: Service) -> None:
    """As many as the answers themselves report; streams report none unless they are asked to."""
    text, messages = "Hello!", dialogue("capital").request["messages"]
    bodies = {
        "/v1/chat/completions": {"messages": messages, "max_tokens": 12},
        "/v1/completions": {"prompt": [text, text], "max_tokens": 9, "n": 2, "ignore_eos": True, "temperature": 1},
        "/v1/messages": {"messages": messages, "max_tokens": 12},
        "/v1/responses": {"input": text, "max_output_tokens": 12},
    }
    headers = {"Authorization": f"Bearer {MEASURED_KEY}"}
    tokens_in = tokens_out = 0
    for path, body in bodies.items():
        whole, stream = (
            requests.post(
                served.url + path,
                json={"model": "llm", "temperature": 0, "stream": streams, **body},
                headers=headers,
                timeout=60,
            )
            for streams in (False, True)
        )
        assert (whole.status_code, stream.status_code) == (200, 200), whole.text
        assert ": usage" not in stream.text
        usage = whole.json()["usage"]
        tokens_in += 2 * (usage.get("prompt_tokens") or usage.get("input_tokens"))
        tokens_out += 2 * (usage.get("completion_tokens") or usage.get("output_tokens"))
    found = usage_of(served, 8)
    assert (found["tokens_in"], found["tokens_out"], found["errors"]) == (tokens_in, tokens_out, 0)

    endless = {"model": "llm", "prompt": text, "max_tokens": 2000, "ignore_eos": True}
    with pytest.raises(requests.Timeout):
        requests.post(f"{served.url}/v1/completions", json=endless, headers=headers, timeout=0.3)
    left = usage_of(served, 9)
    wait_until(lambda: usage_of(served, 9)["tokens_out"] > tokens_out, 20)
    assert left["errors"] == 1
