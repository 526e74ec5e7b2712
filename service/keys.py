"""Keys: named, kept as SHA-256 digests, never written anywhere else."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from service.errors import UsageError

ANONYMOUS = "anonymous"  # the name that requests are counted under where none needs a key; no key may have it
_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")


def digests(environ: Mapping[str, str]) -> dict[str, str]:
    """Return digest (64 hexadecimal digits) -> name of the keys in `API_KEY` and `API_KEYS`; empty when none is set.

    `API_KEY` is one key, named `default`; `API_KEYS` is `name=key` pairs separated by commas. A key may be given as
    `sha256:<hex>`. A name may have several keys: the old and the new one while they are rotated.

    Raises:
        UsageError: A variable is not UTF-8, a pair lacks name or key, two names share a key, a name is reserved, a
            digest is incomplete. The message never contains a key.
    """
    for variable in ("API_KEY", "API_KEYS"):
        if any("\ud800" <= letter <= "\udfff" for letter in environ.get(variable, "")):  # bytes that are no text
            raise UsageError(f"{variable} is not UTF-8.", hint="Write keys of letters and digits.")
    found: dict[str, str] = {}
    if key := environ.get("API_KEY", "").strip():
        found[_digest("default", key)] = "default"
    for position, pair in enumerate(filter(None, (part.strip() for part in environ.get("API_KEYS", "").split(","))), 1):
        name, separator, key = (part.strip() for part in pair.partition("="))
        if not (name and separator and key):
            raise UsageError(f"API_KEYS: pair {position} is not name=key.", hint="Write 'alice=<key>,bob=<key>'.")
        check_name(name, "API_KEYS")
        owner = found.setdefault(_digest(name, key), name)
        if owner != name:
            raise UsageError(f"API_KEYS: '{owner}' and '{name}' have the same key.", hint="Give each a key of its own.")
    return found


def check_name(name: str, where: str) -> None:
    """Refuse the name of the requests that need no key.

    Args:
        name: Of a key.
        where: In which it stands, for the error.

    Raises:
        UsageError: A key has that name.
    """
    if name == ANONYMOUS:
        raise UsageError(
            f"{where}: '{name}' cannot be the name of a key: requests are counted under it where none needs a key. "
            "Expected another name.",
            hint="Write one such as alice.",
        )


def _digest(name: str, key: str) -> str:
    if match := _DIGEST.fullmatch(key):
        return match[1].lower()
    if key.lower().startswith("sha256:"):
        raise UsageError(
            f"The key '{name}' begins with sha256: and 64 hexadecimal digits do not follow.",
            hint="Copy the whole digest.",
        )
    return digest(key.encode())


def digest(key: bytes) -> str:
    """Return a key's SHA-256 in hexadecimal: the only form in which keys are kept."""
    return hashlib.sha256(key).hexdigest()
