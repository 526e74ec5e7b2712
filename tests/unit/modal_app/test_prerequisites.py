"""What a deploy makes: where its secret cannot be made, a proxy token is not left behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import modal
import pytest

from service.errors import ServiceError
from service.gateway.modal_pool import PROXY_SECRET
from service.modal_app import account, prerequisites
from service.modal_app.prerequisites import Missing

TOKEN = SimpleNamespace(token_id="wk-1", token_secret="ws-1", scoped=False)


class Tokens:
    """The proxy tokens of a workspace."""

    def __init__(self) -> None:
        self.left: list[str] = []

    def create(self, name: str) -> Any:
        """Make one."""
        assert name == "vllm-gateway"
        self.left.append(TOKEN.token_id)
        return TOKEN

    def list(self) -> list[Any]:
        """Return them."""
        return [TOKEN]

    def delete(self, token_id: str) -> None:
        """Remove one."""
        self.left.remove(token_id)


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> Tokens:
    """A workspace without tokens."""
    found = Tokens()
    monkeypatch.setattr(modal.Workspace, "from_context", lambda: SimpleNamespace(proxy_tokens=found))
    return found


def refuse(_name: str, _values: dict[str, str]) -> bool:
    """Do as an account in which no secret may be made."""
    raise ServiceError("Modal refused to create a secret.")


def interrupt(_name: str, _values: dict[str, str]) -> bool:
    """Do as a call that is interrupted."""
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("create", "error"),
    [(refuse, ServiceError), (interrupt, KeyboardInterrupt), (lambda _name, _values: False, ServiceError)],
    ids=["refused", "interrupted", "made by another"],
)
def test_proxy_token_whose_secret_is_not_made_is_deleted(
    monkeypatch: pytest.MonkeyPatch, tokens: Tokens, create: Any, error: type[BaseException]
) -> None:
    """And no key was made or shown; with its secret it stays."""
    monkeypatch.setattr(account, "create_secret", create)
    shown: list[str] = []
    with pytest.raises(error):
        prerequisites.make(Missing("vllm-api-key", PROXY_SECRET), shown.append)
    assert (tokens.left, shown) == ([], [])
    monkeypatch.setattr(account, "create_secret", lambda _name, _values: True)
    prerequisites.make(Missing("vllm-api-key", PROXY_SECRET), shown.append)
    assert (tokens.left, len(shown)) == (["wk-1"], 1)
