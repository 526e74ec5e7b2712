"""The changes that an operator makes to API clients' keys and limits; see `key_records` for what is kept of them."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from pydantic import ValidationError

from service.errors import UsageError, did_you_mean
from service.keys import check_name, digest
from service.usage.key_records import KeyConflictError, KeyRecord, KeyStore, StoredKey
from service.usage.limits import KeyLimits
from service.validation import explain

GRACE_S = 86_400  # how long the old key of a rotation stays valid, unless another time is given
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_ATTEMPTS = 20


class Keys:
    """The changes that an operator makes.

    Args:
        store: Where the records are.
        others: Names of clients whose keys are in the environment, which cannot be changed here.
        clock: Seconds since 1970.
    """

    def __init__(
        self, store: KeyStore, others: Callable[[], set[str]] = set, clock: Callable[[], float] = time.time
    ) -> None:
        self._store, self._others, self._clock = store, others, clock

    def records(self) -> list[KeyRecord]:
        """Return all records, by name."""
        return [record for _, record in sorted(self._store.load().items())]

    def page(self, after: str, limit: int) -> list[KeyRecord]:
        """Return the next records after a name, in the order of names."""
        return self._store.page(after, limit)

    def new(self, name: str, limits: Mapping[str, object]) -> tuple[KeyRecord, str]:
        """Make a client, and return its record and its key, which nobody can read again.

        Raises:
            UsageError: The name is not allowed or taken, or a limit is wrong.
        """
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"'{name[:80]}' cannot be the name of a key: 1 to 64 letters, digits, dots, dashes, underscores and @.",
                hint="Write one such as alice.",
            )
        check_name(name, "New key")
        given = validated(limits)
        self._check_end(given)

        def change(record: KeyRecord | None) -> KeyRecord:
            if name in self._others() or (record and record.revoked_at is None):
                raise UsageError(
                    f"There is a key '{name}' already.", hint="Replace it with 'rotate', or choose another name."
                )
            now = self._clock()
            stored = StoredKey(digest(key.encode()), now)
            return KeyRecord(name, record.version if record else 0, (stored,), given, created_at=now)

        key = new_key()
        return self._change(name, change), key

    def rotate(self, name: str, grace_s: float = GRACE_S) -> tuple[KeyRecord, str]:
        """Make another key of a client; those before it stay valid for a while.

        Raises:
            UsageError: There is no such client here.
        """
        if not 0 <= grace_s <= 366 * 86_400:
            raise UsageError(f"A grace of {grace_s} s is not from 0 s to 366 days.", hint="Write such as 24h.")
        key = new_key()

        def change(record: KeyRecord | None) -> KeyRecord:
            record, now = self._existing(name, record), self._clock()
            end = now + grace_s
            old = [replace(one, ends_at=min(end, one.ends_at or end)) for one in record.keys if one.is_valid(now)]
            kept = [one for one in old if one.is_valid(now)]
            first = record.created_at or min((one.created_at for one in record.keys), default=now)
            return replace(record, keys=(StoredKey(digest(key.encode()), now), *kept), created_at=first)

        return self._change(name, change), key

    def revoke(self, name: str) -> KeyRecord:
        """End all keys of a client.

        Raises:
            UsageError: There is no such client here.
        """

        def change(record: KeyRecord | None) -> KeyRecord:
            return replace(self._existing(name, record), keys=(), revoked_at=self._clock())

        return self._change(name, change)

    def limit(self, name: str, changes: Mapping[str, object]) -> KeyRecord:
        """Change some limits of a client; None and 0 lift one.

        Raises:
            UsageError: There is no such client here, or a limit is wrong.
        """

        def change(record: KeyRecord | None) -> KeyRecord:
            record = self._existing(name, record)
            limits = validated(changes, record.limits)
            if limits.expires != record.limits.expires:
                self._check_end(limits)
            return replace(record, limits=limits)

        return self._change(name, change)

    def _check_end(self, limits: KeyLimits) -> None:
        if limits.expires_at is not None and limits.expires_at <= self._clock():
            raise UsageError(
                f"'expires' is {limits.expires}, which is not in the future: the key would be refused at once.",
                hint="Give a later time; 'vllm-service keys revoke' ends all keys of a name.",
            )

    def _existing(self, name: str, record: KeyRecord | None) -> KeyRecord:
        if record and record.revoked_at is None:
            return record
        if name in self._others():
            raise UsageError(
                f"The key '{name}' is in API_KEY or API_KEYS of the service's environment.",
                hint="Change it there, and its limits in API_LIMITS.",
            )
        known = sorted(other for other, one in self._store.load().items() if one.revoked_at is None)
        what = "was revoked" if record else "does not exist"
        raise UsageError(
            f"The key '{name[:80]}' {what}.{did_you_mean(name, known)}", hint=f"Keys: {', '.join(known) or 'none'}."
        )

    def _change(self, name: str, change: Callable[[KeyRecord | None], KeyRecord]) -> KeyRecord:
        for attempt in range(_ATTEMPTS):
            changed = change(self._store.load().get(name))
            changed = replace(changed, version=changed.version + 1)
            try:
                self._store.save(changed)
            except KeyConflictError:
                time.sleep(0.01 * attempt)
                continue
            return changed
        raise KeyConflictError(f"The keys of '{name}' are being changed all the time.", hint="Try again in a moment.")


def validated(changes: Mapping[str, object], limits: KeyLimits | None = None) -> KeyLimits:
    """Return limits with changes.

    Raises:
        UsageError: One of them is wrong.
    """
    try:
        return (limits or KeyLimits()).with_changes(**changes)
    except ValidationError as error:
        raise UsageError(
            f"Limits: {' '.join(explain(error, KeyLimits))}", hint=f"Fields: {', '.join(KeyLimits.model_fields)}."
        ) from error


def new_key() -> str:
    """Return a key that cannot be guessed."""
    return f"sk-{secrets.token_urlsafe(32)}"
