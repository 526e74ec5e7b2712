"""Proxy tokens, which web methods with `requires_proxy_auth=True` require. Owns the workspace's tokens."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiohttp import web
from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2 as pb

from .rpc import unary

if TYPE_CHECKING:
    from .sandbox import Task


@dataclass(frozen=True)
class ProxyToken:
    """What `modal workspace proxy-tokens create` prints."""

    key: str
    secret: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Modal-Key": self.key, "Modal-Secret": self.secret}

    @property
    def bearer(self) -> str:
        """The token as an OpenAI client sends it: as its API key."""
        return f"{self.key}.{self.secret}"


class ProxyTokens:
    """The workspace's proxy tokens."""

    def __init__(self) -> None:
        self._tokens: list[ProxyToken] = []
        self.scoped = False  # to environments, as in a workspace with roles
        self.allowed: list[str] = []  # ids of scoped tokens that may be used in the environment

    def create(self) -> ProxyToken:
        token = ProxyToken(f"wk-{secrets.token_hex(11)}", f"ws-{secrets.token_hex(11)}")
        self._tokens.append(token)
        return token

    def revoke(self, token: ProxyToken) -> None:
        self._tokens.remove(token)

    @unary("WebhookTokenCreate")
    async def create_for_client(
        self, request: pb.WebhookTokenCreateRequest, task: Task | None
    ) -> pb.TokenCreateResponse:
        token = self.create()
        return pb.TokenCreateResponse(token_id=token.key, token_secret=token.secret)

    @unary("WebhookTokenDelete")
    async def delete(self, request: pb.TokenDeleteRequest, task: Task | None) -> Empty:
        self._tokens = [token for token in self._tokens if token.key != request.token_id]
        return Empty()

    @unary("WebhookTokenList")
    async def list_for_client(self, request: Empty, task: Task | None) -> pb.WebhookTokenListResponse:
        tokens = [pb.WebhookToken(token_id=token.key, scoped=self.scoped) for token in self._tokens]
        return pb.WebhookTokenListResponse(tokens=tokens)

    @unary("WebhookTokenEnvironmentAdd")
    async def allow(self, request: pb.WebhookTokenEnvironmentAddRequest, task: Task | None) -> Empty:
        self.allowed.append(request.token_id)
        return Empty()

    def keys(self) -> list[str]:
        """Return the ids of the tokens, in order of their creation."""
        return [token.key for token in self._tokens]

    def admit(self, request: web.Request) -> bool:
        key, secret = request.headers.get("Modal-Key", ""), request.headers.get("Modal-Secret", "")
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
        return any((key, secret) == (t.key, t.secret) or bearer == t.bearer for t in self._tokens)
