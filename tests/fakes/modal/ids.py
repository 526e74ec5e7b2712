"""Object ids shaped like Modal's (two letters, a dash, 22 characters), counted so that a transcript reads well."""

from __future__ import annotations

import itertools
from collections import defaultdict


class Ids:
    """Counts per kind of object; the client distinguishes kinds by the two letters."""

    def __init__(self) -> None:
        self._counters: defaultdict[str, itertools.count[int]] = defaultdict(lambda: itertools.count(1))

    def new(self, kind: str) -> str:
        return f"{kind}-{next(self._counters[kind]):022d}"
