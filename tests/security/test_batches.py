"""Attacks on files and batches: extremes of every field, forms and lines with wrong bytes, ids of other places."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from urllib.parse import quote

from .barrage import Input, barrage
from .mutations import mutated_bytes
from .payloads import EXTREMES
from .targets import KEY, OTHER_KEY, Target, request

SEED = 31
FORM = (
    b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="in.jsonl"\r\nContent-Type: text/plain\r\n\r\n'
    b"%b\r\n--b--\r\n"
)
LINE = (
    b'{"custom_id": "%d", "method": "POST", "url": "/v1/completions", '
    b'"body": {"model": "tiny", "prompt": "Hi", "max_tokens": 1}}'
)
FIELDS = ("input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after", "other")
IDS = (
    "file-1",
    "batch_1",
    "..",
    "%2e%2e",
    "..%2f..%2fetc",
    "file-..%2frecord.json",
    "file-%00",
    "key-attacked",
    "x" * 5000,
    "%ff",
)


def sent(method: str, path: str, body: bytes = b"", content_type: str = "application/json", key: str = KEY) -> bytes:
    """Return a request with the attacker's key."""
    return request(method, path, {"Authorization": f"Bearer {key}", "Content-Type": content_type}, body)


def uploaded(target: Target, content: bytes, key: str = KEY) -> str:
    """Upload a file and return its id."""
    with target.connection() as connection:
        answer = connection.ask(sent("POST", "/v1/files", FORM % content, "multipart/form-data; boundary=b", key))
    assert answer.status == 200, answer
    return str(json.loads(answer.body)["id"])


def requests_of(file_id: str) -> Iterator[Input]:
    """Yield bodies of a batch with extremes, and every route with ids that name something else."""
    good = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "1s"}
    for field in FIELDS:
        for number, value in enumerate(EXTREMES):
            if (field, value) not in ((name, good.get(name)) for name in FIELDS):
                body = json.dumps(good | {"endpoint": "/v1/none"} | {field: value}).encode()
                yield Input(f"{field} {number}", "/v1/batches", sent("POST", "/v1/batches", body))
    for one in IDS:
        for method, path in (
            ("GET", "/v1/files/{}"), ("GET", "/v1/files/{}/content"), ("DELETE", "/v1/files/{}"),
            ("GET", "/v1/batches/{}"), ("POST", "/v1/batches/{}/cancel"),
        ):  # fmt: skip
            yield Input(one, "/v1/files", sent(method, path.format(one)))
    for query in ("limit=0", "limit=-1", "limit=x", "limit=99999999999999999999", "order=up", "after=x", "purpose=x"):
        for path in ("/v1/files", "/v1/batches"):
            yield Input(query, path, sent("GET", f"{path}?{quote(query, safe='=')}"))


def forms(count: int) -> Iterator[Input]:
    """Yield uploads with wrong bytes."""
    rng = random.Random(SEED)  # noqa: S311 - no secret
    for number in range(count):
        body = mutated_bytes(FORM % (LINE % number), rng)
        kind = rng.choice(("multipart/form-data; boundary=b",) * 8 + ("multipart/form-data", "text/plain"))
        yield Input(f"form {number}", "/v1/files", sent("POST", "/v1/files", body, kind))


def test_extremes_of_files_and_batches_do_no_harm(attacked_gateway: Target) -> None:
    """Each is served or refused as documented, and nothing of another place is read or deleted."""
    file_id = uploaded(attacked_gateway, LINE % 1)
    with attacked_gateway.unharmed():
        outcome = barrage(attacked_gateway, [*requests_of(file_id), *forms(400)])

    assert outcome.finds == []
    assert set(outcome.statuses) >= {200, 400, 404}
    assert attacked_gateway.ask("GET", f"/v1/files/{file_id}").status == 200


def test_lines_with_wrong_bytes_end_in_the_error_file_and_nowhere_else(attacked_gateway: Target) -> None:
    """A batch of them is completed, with one record a line, and the service lives."""
    rng = random.Random(SEED)  # noqa: S311 - no secret
    lines = [mutated_bytes(LINE % number, rng).replace(b"\n", b"") for number in range(300)]
    with attacked_gateway.unharmed():
        file_id = uploaded(attacked_gateway, b"\n".join(lines))
        body = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "10m"}
        batch = json.loads(attacked_gateway.ask("POST", "/v1/batches", json.dumps(body).encode()).body)
        while batch["status"] not in {"completed", "failed", "expired"}:
            time.sleep(0.1)
            batch = json.loads(attacked_gateway.ask("GET", f"/v1/batches/{batch['id']}").body)

    counts = batch["request_counts"]
    assert batch["status"] == "completed"
    assert counts["completed"] + counts["failed"] == counts["total"] == sum(bool(line.strip()) for line in lines)
    assert counts["failed"] > 50


def test_other_key_gets_404_for_files_and_batches_of_the_first(attacked_gateway: Target) -> None:
    """By every method; it cannot delete or cancel either."""
    file_id = uploaded(attacked_gateway, LINE % 1)
    body = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "1h"}
    batch = json.loads(attacked_gateway.ask("POST", "/v1/batches", json.dumps(body).encode()).body)
    for method, path in (
        ("GET", f"/v1/files/{file_id}"), ("GET", f"/v1/files/{file_id}/content"), ("DELETE", f"/v1/files/{file_id}"),
        ("GET", f"/v1/batches/{batch['id']}"), ("POST", f"/v1/batches/{batch['id']}/cancel"),
    ):  # fmt: skip
        assert attacked_gateway.ask(method, path, key=OTHER_KEY).status == 404, (method, path)
    assert attacked_gateway.ask("POST", "/v1/batches", json.dumps(body).encode(), key=OTHER_KEY).status == 404
    assert attacked_gateway.ask("GET", f"/v1/batches/{batch['id']}").status == 200
