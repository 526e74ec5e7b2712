"""The progress of a download or a verification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["fetching", "verifying", "reading", "uploading"]


@dataclass(frozen=True)
class Progress:
    """The progress of one repository.

    Attributes:
        hub_id: The repository; of what is being uploaded, its name.
        done_bytes: While fetching, bytes on this disk, unfinished files included; else bytes verified, read or sent.
        total_bytes: Of all files that the engine reads.
        files_done: Files that are on this disk and verified.
        files: How many there are.
        phase: What takes the time now.
    """

    hub_id: str
    done_bytes: int
    total_bytes: int
    files_done: int
    files: int
    phase: Phase = "fetching"
