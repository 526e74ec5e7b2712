"""Sets fields of a JSON body without parsing or copying it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

_EMPTY_OBJECT = re.compile(rb"\s*\{\s*\}")


def with_overrides(body: bytes | bytearray, overrides: Mapping[str, object]) -> tuple[memoryview, bytes]:
    """Return a body with these fields set, in two parts: a view of `body` without its last brace, and the rest.

    `body` is one JSON object. The fields come last, where they win over earlier ones of the same name.
    """
    added = json.dumps(dict(overrides), allow_nan=False, separators=(",", ":"))[1:].encode()
    comma = b"" if not overrides or _EMPTY_OBJECT.match(body) else b","
    return memoryview(body)[: body.rfind(b"}")], comma + added
