"""What the OpenAPI document says of the routes of files and batches: OpenAI's own shapes.

`tests/gateway/test_openapi.py` compares answers of a running gateway with them.
"""

from __future__ import annotations

from service.gateway.schema_parts import (
    BOOLEAN,
    INTEGER,
    PAGE_LIMIT,
    TEXT,
    Schema,
    answer,
    array,
    body,
    object_of,
    one_of,
    or_null,
    query,
    ref,
    said,
)

_TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
_KEPT = object_of(anchor={"const": "created_at"}, seconds=INTEGER)
_FORM = object_of(
    ("expires_after[anchor]", "expires_after[seconds]"),
    file={"type": "string", "format": "binary", "description": "A JSON object a line"},
    purpose={"const": "batch"},
    **{"expires_after[anchor]": {"const": "created_at"}, "expires_after[seconds]": INTEGER},
)
_NEW = object_of(
    ("metadata", "output_expires_after"),
    input_file_id=TEXT,
    endpoint=said(TEXT, "The route that each line names"),
    completion_window=said(TEXT, "At most 24h, such as 24h, 90m or 45s"),
    metadata=or_null({"type": "object", "additionalProperties": TEXT}),
    output_expires_after=or_null(_KEPT),
)
_EXAMPLE = {"input_file_id": "file-…", "endpoint": "/v1/chat/completions", "completion_window": "24h"}
_PAGE = query(limit=PAGE_LIMIT, after=said(TEXT, "Only those that come after this id"), order=one_of("asc", "desc"))


def _page_of(name: str) -> Schema:
    ends = {"first_id": or_null(TEXT), "last_id": or_null(TEXT)}
    return answer(object_of(object={"const": "list"}, data=array(ref(name)), has_more=BOOLEAN, **ends))


def schemas() -> dict[str, Schema]:
    """Return name -> schema."""
    statuses = one_of(
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    )
    error = object_of(code=TEXT, message=TEXT, param=or_null(TEXT), line=or_null(INTEGER))
    return {
        "StoredFile": object_of(
            id=TEXT,
            object={"const": "file"},
            bytes=INTEGER,
            created_at=INTEGER,
            expires_at=INTEGER,
            filename=TEXT,
            purpose=one_of("batch", "batch_output"),
            status=TEXT,
            status_details={"type": "null"},
        ),
        "Batch": object_of(
            id=TEXT,
            object={"const": "batch"},
            endpoint=TEXT,
            input_file_id=TEXT,
            completion_window=TEXT,
            created_at=INTEGER,
            expires_at=INTEGER,
            status=statuses,
            metadata=or_null({"type": "object", "additionalProperties": TEXT}),
            errors=or_null(object_of(object={"const": "list"}, data=array(error)), "What is wrong with all of it"),
            request_counts=object_of(total=INTEGER, completed=INTEGER, failed=INTEGER),
            output_file_id=or_null(TEXT, "The file of the answers"),
            error_file_id=or_null(TEXT, "The file of the lines that failed"),
            **{f"{name}_at": or_null(INTEGER) for name in _TIMES},
        ),
    }


def operations() -> dict[tuple[str, str], Schema]:
    """Return (method, path) -> what an operation has beside its summary, its key and its errors."""
    form = {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}
    deleted = object_of(id=TEXT, object={"const": "file"}, deleted={"const": True})
    batch, file = answer(ref("Batch")), answer(ref("StoredFile"))
    return {
        ("POST", "/v1/files"): {"requestBody": form} | file,
        ("GET", "/v1/files"): _page_of("StoredFile") | {"parameters": [*query(purpose=TEXT), *_PAGE]},
        ("GET", "/v1/files/{file_id}"): file,
        ("DELETE", "/v1/files/{file_id}"): answer(deleted),
        ("GET", "/v1/files/{file_id}/content"): answer(TEXT, media_type="application/jsonl"),
        ("POST", "/v1/batches"): body(_NEW, chat=_EXAMPLE) | batch,
        ("GET", "/v1/batches"): _page_of("Batch") | {"parameters": _PAGE},
        ("GET", "/v1/batches/{batch_id}"): batch,
        ("POST", "/v1/batches/{batch_id}/cancel"): batch,
    }
