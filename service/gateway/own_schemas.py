"""What the OpenAPI document says of the routes that the gateway answers itself: queries, bodies and answers.

Where a model or dataclass is what a route reads or answers, its schema is made from that; the others are written here.
`tests/gateway/test_openapi.py` compares answers of a running gateway with them.
"""

from __future__ import annotations

from typing import Any, get_args

from service.boots.records import BootRecord, Span
from service.gateway.pool import State
from service.gateway.recent_requests import COLUMNS, RUNNING_COLUMNS
from service.gateway.schema_parts import (
    BOOLEAN,
    INTEGER,
    NUMBER,
    PAGE_LIMIT,
    TEXT,
    Schema,
    answer,
    array,
    body,
    object_of,
    one_of,
    or_null,
    properties_of,
    query,
    ref,
    said,
)
from service.usage.limits import KeyLimits
from service.usage.report import By, UsageRow

_STATES = [*get_args(State), "failed", "does_not_fit"]
MODEL_QUERY = query(model=said(TEXT, "Any name of a model; default: the model that `llm` stands for"))
_WAKE = body(object_of(model=said(TEXT, "Any name of the model")), default={"model": "llm"})
_KEY_FIELDS = {
    "name": TEXT,
    "state": one_of("environment", "valid", "expired", "revoked"),
    "keys": array(object_of(created=TEXT, ends=or_null(TEXT, "When it ends, after a rotation"))),
    "limits": ref("KeyLimits"),
    "revoked": or_null(TEXT),
}
_KEY_MADE = object_of(**_KEY_FIELDS, key=said(TEXT, "The key itself, which no later answer has"))


def _named(optional: dict[str, Schema], **example: Any) -> Schema:
    """Return a body with the name of a key, and further fields."""
    schema = object_of(optional, name=said(TEXT, "Whose key it is"), **optional)
    return body(schema, alice={"name": "alice", **example})


def schemas() -> dict[str, Schema]:
    """Return name -> schema of what several routes have."""
    limits = properties_of(KeyLimits)
    return {
        "Model": object_of(
            id=TEXT,
            object={"const": "model"},
            type={"const": "model"},
            display_name=TEXT,
            created_at=TEXT,
            lifecycle=TEXT,
            created=INTEGER,
            owned_by=TEXT,
            root=said(TEXT, "Hub id"),
            parent=or_null(TEXT, "Of an adapter: its model"),
            max_model_len=or_null(INTEGER, "Context, in tokens"),
            gpu=TEXT,
            dollars_per_hour=or_null(NUMBER, "Price of one replica now; null on this machine"),
            state=said(one_of(*_STATES), "`failed`: its last wake did; `reason` says why"),
            reason=or_null(TEXT),
            waking_s=said(NUMBER, "How long it has been waking"),
            usual_s=or_null(NUMBER, "How long a wake takes, by the last one or by recorded boots"),
        ),
        "Key": object_of(("revoked",), **_KEY_FIELDS),
        "KeyLimits": object_of(limits, **limits),
        "UsageRow": object_of(**properties_of(UsageRow)),
        "Pool": object_of(
            name=TEXT,
            id=said(TEXT, "Key of the model"),
            root=TEXT,
            max_model_len=or_null(INTEGER),
            gpu=TEXT,
            dollars_per_hour=or_null(NUMBER),
            state=one_of(*_STATES),
            reason=or_null(TEXT),
            waking_s=NUMBER,
            usual_s=or_null(NUMBER),
            is_full=BOOLEAN,
            in_use=said(INTEGER, "Requests for it, those that wait for its wake included"),
            answering=said(INTEGER, "Requests that its engine answers"),
            idle_s=NUMBER,
            phases=array(
                array({}, prefixItems=[TEXT, NUMBER, NUMBER]),
                description="Of its wake: name, begin and end in seconds",
            ),
            engine=or_null(
                {"type": "object", "additionalProperties": NUMBER}, "vLLM's own figures; null: it was not asked"
            ),
        ),
        "Boot": object_of(**properties_of(BootRecord)),
        "Span": object_of(**properties_of(Span)),
    }


def operations() -> dict[tuple[str, str], Schema]:
    """Return (method, path) -> what an operation has beside its summary, its key and its errors."""
    key, limits = ref("Key"), properties_of(KeyLimits)
    adapter = object_of(
        model=said(TEXT, "Any name of the model"),
        name=said(TEXT, "By which requests name the adapter"),
        hub_id=TEXT,
        revision=said(TEXT, "A commit, 40 hexadecimal digits"),
    )
    return {
        ("GET", "/health"): answer(object_of(status={"const": "ok"})),
        ("GET", "/v1/models"): answer(
            object_of(
                ("first_id", "last_id"),
                object={"const": "list"},
                data=array(ref("Model")),
                has_more=BOOLEAN,
                first_id=TEXT,
                last_id=TEXT,
            )
        ),
        ("GET", "/v1/models/{model}"): answer(ref("Model")),
        ("GET", "/v1/usage"): answer(
            object_of(
                object={"const": "list"},
                by=one_of(*get_args(By)),
                data=array(ref("UsageRow")),
                more=said(BOOLEAN, "Whether further rows follow"),
                total=ref("UsageRow"),
            )
        )
        | {
            "parameters": query(
                by=said({**one_of(*get_args(By)), "default": "key"}, "What a row is the sum of"),
                since=said(TEXT, "A date, a time, or how long ago: 2026-11-29, 36h, 7d"),
                limit=PAGE_LIMIT,
                offset=INTEGER,
            )
        },
        ("GET", "/v1/key"): answer(object_of(name=TEXT, admin=BOOLEAN, anonymous=BOOLEAN, limits=ref("KeyLimits"))),
        ("GET", "/v1/requests"): answer(
            object_of(
                object={"const": "list"},
                columns=said(array(TEXT), f"Names of what a row has: {', '.join(COLUMNS)}"),
                data=said(array(array({})), "A row for each request that has ended, the newest first"),
                more=said(BOOLEAN, "Whether older rows follow"),
                last=said(INTEGER, "Number of the newest request"),
                running=object_of(
                    columns=said(array(TEXT), f"Names of what a row has: {', '.join(RUNNING_COLUMNS)}"),
                    count=INTEGER,
                    data=array(array({})),
                ),
            )
        )
        | {
            "parameters": query(
                limit=PAGE_LIMIT,
                before=said(INTEGER, "Only rows with a lower number"),
                after=said(INTEGER, "Only rows with a higher number"),
                id=said(TEXT, "Only the request with this id"),
            )
        },
        ("GET", "/metrics"): answer(TEXT, media_type="text/plain") | {"parameters": MODEL_QUERY},
        ("GET", "/admin/pools"): answer(object_of(object={"const": "list"}, data=array(ref("Pool")))),
        ("POST", "/admin/pools/wake"): _WAKE | answer(object_of(model=TEXT, state=one_of(*_STATES)), 202),
        ("POST", "/admin/pools/stop"): _WAKE | answer(object_of(model=TEXT, state=one_of(*_STATES)), 202),
        ("GET", "/admin/boots"): answer(object_of(object={"const": "list"}, data=array(ref("Boot"))))
        | {"parameters": MODEL_QUERY},
        ("GET", "/admin/keys"): answer(object_of(keys=array(key), more=said(BOOLEAN, "Whether further keys follow")))
        | {"parameters": query(limit=PAGE_LIMIT, after=said(TEXT, "Only keys whose names come after this one"))},
        ("POST", "/admin/keys"): _named(limits, requests_per_minute=60) | answer(_KEY_MADE),
        ("POST", "/admin/keys/rotate"): _named(
            {"grace_s": said(NUMBER, "How many seconds the old key stays valid")}, grace_s=3600
        )
        | answer(_KEY_MADE),
        ("POST", "/admin/keys/revoke"): _named({}) | answer(key),
        ("POST", "/admin/keys/limit"): _named(limits, requests_per_minute=None) | answer(key),
        ("POST", "/admin/adapters"): body(
            adapter, sql={"model": "qwen3-8b", "name": "sql", "hub_id": "org/sql-lora", "revision": "0" * 40}
        )
        | answer(adapter),
        ("POST", "/admin/reload"): answer(object_of(models=INTEGER, keys=INTEGER)),
        ("GET", "/"): answer(TEXT, media_type="text/html"),
        ("GET", "/console/{file}"): answer(TEXT, media_type="text/html"),
        ("GET", "/docs"): answer(TEXT, media_type="text/html"),
        ("GET", "/docs/{file}"): answer(TEXT, media_type="text/html"),
        ("GET", "/openapi.json"): answer({"type": "object"}),
    }
