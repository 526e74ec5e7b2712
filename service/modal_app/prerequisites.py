"""The secrets that a gateway needs: looked up, and made where they are missing."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from service import interrupts
from service.errors import ServiceError
from service.gateway import webhook
from service.gateway.modal_pool import PROXY_SECRET
from service.keys import digest
from service.modal_app import account
from service.settings import Settings

ADMIN = "admin"


@dataclass(frozen=True)
class Missing:
    """What has to be made: the secret with keys, the secret with a proxy token."""

    keys_secret: str | None
    proxy_secret: str | None

    @property
    def names(self) -> list[str]:
        """The names of the secrets."""
        return [name for name in (self.proxy_secret, self.keys_secret) if name]


def missing(settings: Settings) -> Missing:
    """Return what the account lacks.

    Raises:
        ServiceError: A secret of that name has not the keys that are read from it.
    """
    keys = settings.keys_secret
    needed = {keys: (["API_KEYS"], ["API_KEY"]), PROXY_SECRET: (["MODAL_KEY", "MODAL_SECRET"],)}
    if settings.direct_auth == "keys":
        del needed[PROXY_SECRET]
    hints = {keys: "API_KEY=<key>", PROXY_SECRET: "MODAL_KEY=wk-… MODAL_SECRET=ws-…"}
    lacking: set[str] = set()
    for name, choices in needed.items():
        exists, why = account.why_secret_unusable(name, *choices)
        if exists and why:
            raise ServiceError(
                f"Secret '{name}' cannot be used: {why}.",
                hint=f"Put it in: modal secret create --force {name} {hints[name]}. Or delete the secret, and this "
                f"command makes one: modal secret delete {name}.",
            )
        lacking |= set() if exists else {name}
    _check_webhook(settings.webhook_secret)
    return Missing(keys if keys in lacking else None, PROXY_SECRET if PROXY_SECRET in lacking else None)


def _check_webhook(name: str | None) -> None:
    """Refuse a secret that was named for the webhook and has no URL: only the operator knows it."""
    if name and (why := account.why_secret_unusable(name, [webhook.VARIABLE])[1]):
        raise ServiceError(
            f"SERVICE_WEBHOOK_SECRET='{name}' cannot be used: {why}.",
            hint=f"Create it: modal secret create {name} {webhook.VARIABLE}=https://…",
        )


def make(lacking: Missing, on_key: Callable[[str], None]) -> None:
    """Make what is missing. Ctrl-C waits until a secret is there, so no token and no key is lost on the way.

    Args:
        lacking: What to make.
        on_key: Called with the admin key where one was made: nobody can read it again.

    Raises:
        ServiceError: Modal refused.
        KeyboardInterrupt: It was interrupted; what was made before stays.
    """
    if lacking.proxy_secret:
        with interrupts.held_back(), account.new_proxy_token("vllm-gateway") as token:
            if not account.create_secret(lacking.proxy_secret, token):
                raise _just_made(lacking.proxy_secret)
    if lacking.keys_secret:
        key = f"sk-{secrets.token_urlsafe(32)}"
        with interrupts.held_back():
            if not account.create_secret(lacking.keys_secret, {"API_KEYS": f"{ADMIN}=sha256:{digest(key.encode())}"}):
                raise _just_made(lacking.keys_secret)
            on_key(key)


def _just_made(name: str) -> ServiceError:
    return ServiceError(
        f"Secret '{name}' was made by somebody else a moment ago.", hint="Run the same command again: it uses that one."
    )
