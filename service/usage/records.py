"""What the ledger keeps of a request: who, which model, how much. Never content, never a key."""

from __future__ import annotations

from typing import Any

import msgspec

OPERATOR = "(operator)"  # whose row has what no caller pays: wakes, and replicas that waited; no key has this name


class UsageRecord(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One request that has ended.

    Attributes:
        at: When it ended, in seconds since 1970.
        key: Name of its key.
        model: Key of the model that answered; `-` where it was refused before that was known.
        tokens_in: Tokens of the prompt, cached ones included; None: no engine reported them.
        tokens_cached: Those of `tokens_in` that the engine had in its prefix cache.
        tokens_out: Tokens of the answer.
        seconds: From its first byte to the end of the answer, `held_s` included.
        held_s: How long it waited for its pool.
        status: HTTP status; 499: the client left. 0: no request, but what an engine did for one that its answer
            could not tell, since the client had left or the engine failed.
        replica: Id of the replica that answered.
        cost: Its share of what the replica cost, in dollars.
        dollars: What its caller owes: the price of its tokens where the entry has one, else `cost`.
    """

    at: float
    key: str
    model: str
    tokens_in: int | None = None
    tokens_cached: int | None = None
    tokens_out: int | None = None
    seconds: float
    held_s: float = 0.0
    status: int
    replica: str | None = None
    cost: float | None = None
    dollars: float | None = None

    @property
    def is_request(self) -> bool:
        """Whether it counts as a request."""
        return self.status != 0

    @property
    def hour(self) -> int:
        """The hour in which it ended, as the table `hours` counts them."""
        return int(self.at // 3600)

    def as_row(self) -> dict[str, Any]:
        """Return its columns."""
        return msgspec.structs.asdict(self)
