"""Which service `modal run -m service.loadtest` tests."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from service import loadtest
from service.errors import UsageError
from service.modal_app import deployed
from service.modal_app.gateway_access import KEY_VARIABLE, api_key

GATEWAY = "https://team--vllm-gateway-serve.modal.run"


@pytest.fixture(autouse=True)
def nothing_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable names a service or has a key; the workspace has a gateway."""
    for name in ("VLLM_GATEWAY_URL", KEY_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(deployed, "find", lambda _names, target: SimpleNamespace(url=GATEWAY if target is None else ""))


def test_load_test_asks_the_deployed_gateway_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the key in the environment."""
    monkeypatch.setenv(KEY_VARIABLE, "sk-1")
    assert loadtest._base_url("") == GATEWAY


def test_load_test_of_the_deployed_gateway_without_a_key_is_refused() -> None:
    """Each request would be 401."""
    with pytest.raises(UsageError, match="VLLM_API_KEY is not set"):
        loadtest._base_url("")


def test_load_test_asks_the_service_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the option, else by the variable of every client; a service without keys needs none."""
    monkeypatch.setenv("VLLM_GATEWAY_URL", "http://10.0.0.1:8000/v1")
    assert loadtest._base_url("") == "http://10.0.0.1:8000"
    assert loadtest._base_url("http://10.0.0.2:8000/") == "http://10.0.0.2:8000"


def test_load_test_refuses_a_url_with_a_secret_without_repeating_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The URL is in the report, in the page, and in Locust's command line."""
    monkeypatch.setenv("VLLM_GATEWAY_URL", "https://me:t0psecret@host")
    with pytest.raises(UsageError, match="may be a secret") as refused:
        loadtest._base_url("")
    assert "t0psecret" not in str(refused.value)


def test_load_test_sends_the_key_without_the_newline_of_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """No header can have one; a key of spaces is none."""
    monkeypatch.setenv(KEY_VARIABLE, " sk-1\n")
    assert api_key() == "sk-1"
    monkeypatch.setenv(KEY_VARIABLE, " ")
    with pytest.raises(UsageError, match="VLLM_API_KEY is not set"):
        loadtest._base_url("")
