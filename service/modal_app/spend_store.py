"""What a day has cost, and the prices that a deploy read: in a dictionary at Modal, which outlives the gateway."""

from __future__ import annotations

import asyncio
from typing import Any

import modal

from service.gateway.call_rate import CALL_S
from service.modal_app import account

_ENTRY, _PRICES = "day", "prices"


class DictStore:
    """The entry of a `modal.Dict`; Modal removes what nobody reads for seven days.

    Args:
        app: Name of the gateway's app.
    """

    def __init__(self, app: str) -> None:
        self._dict = modal.Dict.from_name(_name(app), create_if_missing=True)

    async def load(self) -> dict[str, Any] | None:
        """Return what was saved last.

        Raises:
            TimeoutError: Modal did not answer; other errors are those of its client.
        """
        async with asyncio.timeout(CALL_S):
            found: dict[str, Any] | None = await self._dict.get.aio(_ENTRY)
        return found

    async def save(self, record: dict[str, Any]) -> None:
        """Keep it.

        Raises:
            TimeoutError: Modal did not answer; other errors are those of its client.
        """
        async with asyncio.timeout(CALL_S):
            await self._dict.put.aio(_ENTRY, record)


def save_prices(app: str, per_hour: dict[str, float]) -> None:
    """Keep the prices that a deploy has read.

    Raises:
        ServiceError: Modal refused.
    """
    with account.translate_errors("keep the prices for the gateway"):
        modal.Dict.from_name(_name(app), create_if_missing=True)[_PRICES] = per_hour


async def load_prices(app: str) -> dict[str, float] | None:
    """Return the prices that the last deploy has read; None: it had none."""
    found: dict[str, float] | None = await modal.Dict.from_name(_name(app), create_if_missing=True).get.aio(_PRICES)
    return found


def _name(app: str) -> str:
    return f"{app}-spend"
