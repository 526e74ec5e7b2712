"""Keys: named, kept as SHA-256 digests, never written anywhere else."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from service.errors import UsageError

_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")


def digests(environ: Mapping[str, str]) -> dict[str, str]:
    """Return name -> digest (64 hexadecimal digits) of the keys in `API_KEY` and `API_KEYS`; empty when neither is set.

    `API_KEY` is one key, named `default`; `API_KEYS` is `name=key` pairs separated by commas. A key may be given as
    `sha256:<hex>`.

    Raises:
        UsageError: A pair lacks name or key, a name stands twice, a digest is cut. The sentence never holds a key.
    """
    found: dict[str, str] = {}
    if key := environ.get("API_KEY", "").strip():
        found["default"] = _digest("default", key)
    for position, pair in enumerate(filter(None, (part.strip() for part in environ.get("API_KEYS", "").split(","))), 1):
        name, separator, key = (part.strip() for part in pair.partition("="))
        if not (name and separator and key):
            raise UsageError(f"API_KEYS: pair {position} is not name=key. Write 'alice=<key>,bob=<key>'.")
        if name in found:
            raise UsageError(f"API_KEYS: the name '{name}' stands twice (API_KEY is 'default'). Give each key its own.")
        found[name] = _digest(name, key)
    return found


def _digest(name: str, key: str) -> str:
    if match := _DIGEST.fullmatch(key):
        return match[1].lower()
    if key.lower().startswith("sha256:"):
        raise UsageError(f"The key '{name}' is sha256: without 64 hexadecimal digits behind it. Copy the digest whole.")
    return hashlib.sha256(key.encode()).hexdigest()
