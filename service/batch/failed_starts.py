"""Models that do not start, or whose engine dies under each line: for how long their lines wait until they end so.

Each try costs a boot, and nobody watches a batch. A time bounds what the tries cost, however long a boot takes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.batch.worker import Answer

GIVEN_UP_S = 3600.0  # from the first start in a row that failed
_FORGOTTEN_S = 7200.0  # without a word of a model; a line that waits has one at least once in `SERVICE_HOLD_S`
_FAILED, _WAKING = {"model_failed", "engine_lost"}, "model_waking"


class FailedStarts:
    """The starts that failed, in a row, of the models that batches wait for.

    Attributes:
        rows: When the first of them failed, and when the model was last not ready, in seconds since 1970, by model.
    """

    def __init__(self) -> None:
        self.rows: dict[str, tuple[float, float]] = {}

    def join(self, known: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        """Add what an earlier process has kept; return what is to be kept for a later one, and goes on changing."""
        for model, row in known.items():
            self.rows.setdefault(model, row)
        return self.rows

    def take(self, answer: Answer) -> bool:
        """Take the answer to a line; tell whether its model has failed for so long that the line waits no more."""
        if answer.status == 200:
            self.rows.pop(answer.model, None)
        has_failed, now = answer.code in _FAILED, time.time()
        if not has_failed and answer.code != _WAKING:
            return False
        first, last = self.rows.get(answer.model, (now, now))
        if now - last > _FORGOTTEN_S:
            first = now
        if has_failed or answer.model in self.rows:
            self.rows[answer.model] = first, now
        return has_failed and now - first >= GIVEN_UP_S
