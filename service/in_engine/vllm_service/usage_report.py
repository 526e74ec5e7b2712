"""What an engine tells its gateway of a request: the replica, the tokens, and the share of the replica's time.

An answer that is no stream has it in a header, a stream in a comment at its end, which the gateway takes out.
Standard library only: the gateway and the engine both import this.
"""

from __future__ import annotations

import re
from typing import NamedTuple

REPLICA_HEADER, USAGE_HEADER = b"x-replica-id", b"x-engine-usage"
_TEXT = re.compile(rb"in=(\d+) cached=(\d+) out=(\d+) share=(\d+\.\d+)")
_COMMENT = b": usage "
_END = b"\n\n"
_LONGEST = 128  # bytes of a comment


class EngineUsage(NamedTuple):
    """What one request used.

    Attributes:
        tokens_in: Tokens of its prompts, cached ones included.
        tokens_cached: Those that the prefix cache had.
        tokens_out: Tokens that were generated.
        share_s: Its share of the seconds in which the replica ran requests: each second is divided among those in it.
    """

    tokens_in: int
    tokens_cached: int
    tokens_out: int
    share_s: float

    def to_text(self) -> bytes:
        """Return the header's value."""
        return b"in=%d cached=%d out=%d share=%.6f" % self

    def to_comment(self) -> bytes:
        """Return the comment of a stream."""
        return _COMMENT + self.to_text() + _END


def parse(text: bytes) -> EngineUsage | None:
    """Return what a header or comment says; None: it says nothing that this version knows."""
    if found := _TEXT.fullmatch(text):
        return EngineUsage(int(found[1]), int(found[2]), int(found[3]), float(found[4]))
    return None


def without_comment(chunk: bytes) -> tuple[bytes, EngineUsage | None]:
    """Return bytes of a stream without the comment at their end, and what it says.

    A comment that the connection delivers in two pieces stays: clients ignore comments.
    """
    at = chunk.rfind(_COMMENT, -_LONGEST)
    if at < 0 or not chunk.endswith(_END) or (at and chunk[at - 1 : at] != b"\n"):
        return chunk, None
    usage = parse(chunk[at + len(_COMMENT) : -len(_END)])
    return (chunk[:at], usage) if usage else (chunk, None)
