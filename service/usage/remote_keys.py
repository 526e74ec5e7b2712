"""Keys of a gateway elsewhere, changed through its routes for operators."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import httpx2

from service.errors import ServiceError, UsageError

_ANSWER_S = 180.0  # a container of a deployed gateway starts in seconds, its first image takes longer


class RemoteKeys:
    """Asks a gateway.

    Args:
        url: Of the gateway.
        key: An admin key of it.

    Raises:
        UsageError: No header can have the key.
    """

    def __init__(self, url: str, key: str) -> None:
        if not key or not (key.isascii() and key.isprintable()):
            raise UsageError(
                "An admin key of the gateway is needed to change its keys.", hint="Set VLLM_API_KEY to one."
            )
        self._url, self._key = url.rstrip("/").removesuffix("/v1"), key

    def records(self) -> list[dict[str, Any]]:
        """Return all keys with their limits, without any digest."""
        found: list[dict[str, Any]] = self._ask("GET", "/admin/keys")["keys"]
        return found

    def change(self, word: str, name: str, fields: Mapping[str, object]) -> dict[str, Any]:
        """Make, rotate, revoke or limit a key, and return its record; that of a new key has it as `key`.

        Raises:
            ServiceError: The gateway refused, or did not answer.
        """
        path = "/admin/keys" if word == "new" else f"/admin/keys/{word}"
        return self._ask("POST", path, {"name": name, **fields})

    def _ask(self, method: str, path: str, body: Mapping[str, object] | None = None) -> dict[str, Any]:
        url = f"{self._url}{path}"
        try:
            with httpx2.Client(timeout=_ANSWER_S) as http:
                answer = http.request(method, url, json=body, headers={"Authorization": f"Bearer {self._key}"})
            found = json.loads(answer.content)
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
            why = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
            raise ServiceError(f"{url} did not answer as a gateway does: {why}.") from error
        if answer.status_code == 200 and isinstance(found, dict):
            return found
        reason = found.get("error", {}).get("message", "") if isinstance(found, dict) else ""
        hint = "Set VLLM_API_KEY to an admin key of the gateway." if answer.status_code in {401, 403} else ""
        raise ServiceError(f"{url} answered {answer.status_code}: {' '.join(str(reason).split())[:500]}", hint=hint)
