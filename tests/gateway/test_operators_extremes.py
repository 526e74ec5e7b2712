"""Extremes of every field of the routes for operators, and of the queries of `/v1/usage` and `/v1/models`."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import quote

from service.usage.key_records import DatabaseKeys
from service.usage.limits import KeyLimits
from tests.gateway.test_admin import ALICE, admin_gateway, store
from tests.gateway.upstream import RunningGateway
from tests.security.payloads import EXTREMES

__all__ = ["store"]
ROUTES = ("/admin/keys", "/admin/keys/rotate", "/admin/keys/revoke", "/admin/keys/limit", "/admin/adapters")
ADAPTER = {"model": "tiny", "name": "poet", "hub_id": "org/poet", "revision": "a" * 40}
OPERATED = [*KeyLimits.model_fields, *ADAPTER, "grace_s", "expires_s", "unknown"]
QUERIES = (
    *(f"/v1/usage?{name}=" for name in ("by", "since", "until", "limit", "offset", "key", "model")),
    *(f"/v1/requests?{name}=" for name in ("before", "after", "limit", "id")),
    *("/admin/keys?limit=", "/admin/keys?after=", "/admin/pools?model=", "/admin/boots?model="),
    *("/v1/models/", "/metrics?model="),
)


def bodies() -> list[bytes]:
    """Return a body for each extreme of each field, and bodies that are no object."""
    begun = {"name": "carol"}
    found = [json.dumps({**begun, field: value}) for field in OPERATED for value in EXTREMES]
    found += [json.dumps({**ADAPTER, field: value}) for field in ADAPTER for value in EXTREMES]
    return [one.encode("utf-8", "surrogatepass") for one in (*found, *map(json.dumps, EXTREMES))] + [b"", b"{", b"\xff"]


async def told(gateway: RunningGateway, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
    """Return status and JSON of an answer."""
    headers = {**ALICE, "Content-Type": "application/json"}
    async with gateway.http.request(method, gateway.url + path, data=body, headers=headers) as answer:
        text = await answer.text()
        return answer.status, json.loads(text) if answer.content_type == "application/json" else text


def test_extremes_of_every_field_for_operators_are_served_or_refused(store: DatabaseKeys) -> None:
    """No 5xx, no traceback; the store has a key for each that was answered with one."""

    async def run() -> None:
        async with admin_gateway(store) as gateway:
            seen: Counter[int] = Counter()
            for path in ROUTES:
                for body in bodies():
                    status, answer = await told(gateway, "POST", path, body)
                    assert status < 500, (path, body[:200], answer)
                    seen[status] += 1
                    if status >= 400:
                        assert set(answer["error"]) >= {"message", "code"}, (path, body[:200])
            assert seen[400]
            assert (await told(gateway, "GET", "/admin/keys"))[0] == 200

    asyncio.run(run())


def test_extremes_of_queries_are_served_or_refused(store: DatabaseKeys, tmp_path: Path) -> None:
    """No 5xx, whatever stands in a query or a name."""

    async def run() -> None:
        async with admin_gateway(store) as gateway:
            texts = [value if isinstance(value, str) else json.dumps(value) for value in EXTREMES]
            for path in QUERIES:
                for text in texts:
                    sent = path + quote(text[:4000].encode("utf-8", "surrogatepass"), safe="")
                    status, answer = await told(gateway, "GET", sent)
                    assert status < 500, (sent[:200], answer)

    asyncio.run(run())
