"""The workspace's prices, as `Workspace.billing.rates()` reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modal_proto import api_pb2 as pb

from .rpc import unary

if TYPE_CHECKING:
    from .sandbox import Task


class Billing:
    """Prices in dollars an hour, by Modal's names."""

    def __init__(self) -> None:
        self.rates = {"cpu_hour_cost": "0.047", "mem_gib_hour_cost": "0.008", "gpu_hour_cost_l4": "0.80"}

    @unary("WorkspaceBillingRates")
    async def current(
        self, request: pb.WorkspaceBillingRatesRequest, task: Task | None
    ) -> pb.WorkspaceBillingRatesResponse:
        return pb.WorkspaceBillingRatesResponse(rates=self.rates)
