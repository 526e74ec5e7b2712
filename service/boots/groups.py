"""Groups boots that can be compared, with what is typical of each: for the tables of `vllm-service boots`.

Compared are the kinds of boot of one model on one GPU: `off`, `gpu, first boot`, `gpu, restored`, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

from service.boots.records import BootRecord, by_time

_NEWEST = 5  # older ones may be of another deploy
_ORDER = ("off", "cpu", "gpu")


@dataclass(frozen=True)
class Group:
    """Boots of one kind, of one model on one GPU, oldest first."""

    model: str
    gpu: str
    fast_boot: bool
    kind: str
    records: tuple[BootRecord, ...]

    @property
    def subject(self) -> str:
        """What its kinds are compared for, such as `qwen3-8b on H100`."""
        return f"{self.model} on {self.gpu}" + ("" if self.fast_boot else ", without fast boot")

    @property
    def ready_seconds(self) -> tuple[float, ...]:
        """Seconds to ready of the boots with outcome `ready`."""
        return tuple(record.seconds for record in self.records if record.outcome == "ready")

    @property
    def median(self) -> float | None:
        """The median of `ready_seconds`; None where there are none."""
        return median(self.ready_seconds) if self.ready_seconds else None

    @property
    def spread(self) -> tuple[float, float] | None:
        """The shortest and the longest of `ready_seconds`; None where there are not two."""
        ready = self.ready_seconds
        return (min(ready), max(ready)) if len(ready) > 1 else None

    def count(self, outcome: str) -> int:
        """Return how many boots ended so."""
        return sum(record.outcome == outcome for record in self.records)


def kind(record: BootRecord) -> str:
    """Return the kind of a boot; the first boot of a strategy with snapshots is the one that takes the snapshot."""
    strategy = shortened(record.strategy, 20)
    if record.restored:
        return f"{strategy}, restored"
    return strategy if strategy == "off" else f"{strategy}, first boot"


def groups(records: Iterable[BootRecord]) -> list[Group]:
    """Return the records by model, GPU and fast boot, and in each by kind: `off`, `cpu`, `gpu`, first boots first."""
    found: dict[tuple[str, str, bool, str], list[BootRecord]] = {}
    for record in sorted(by_time(records), key=_place):
        found.setdefault((record.model, record.gpu, record.fast_boot, kind(record)), []).append(record)
    return [Group(*key, records=tuple(members)) for key, members in found.items()]


def usual_seconds(records: Iterable[BootRecord], model: str, is_its_gpu: Callable[[str], bool]) -> float | None:
    """Return how long a boot of a model takes, by the median of the newest ones that worked; None: there are none."""
    ready = [
        record.seconds
        for record in by_time(records)
        if record.model == model and record.outcome == "ready" and is_its_gpu(record.gpu)
    ]
    return median(ready[-_NEWEST:]) if ready else None


def printable(text: str) -> str:
    """Return the text on one line, without characters that would move a cursor."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def shortened(text: str, width: int) -> str:
    """Return the text on one line, its middle left out where it is longer than `width`."""
    line = printable(text)
    head = (width - 1) // 2
    return line if len(line) <= width else f"{line[:head]}…{line[head + 1 - width :]}"


def _place(record: BootRecord) -> tuple[str, str, bool, int, str, bool]:
    strategy = _ORDER.index(record.strategy) if record.strategy in _ORDER else len(_ORDER)
    return record.model, record.gpu, not record.fast_boot, strategy, record.strategy, record.restored
