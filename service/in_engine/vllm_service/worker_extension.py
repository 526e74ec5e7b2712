"""Adds a call to each worker of the engine."""

from __future__ import annotations


class WorkerExtension:
    """Mixed into vLLM's worker by `--worker-extension-cls`; its methods are called by `collective_rpc`."""

    def renew_randomness(self, seed: int) -> None:
        """Seed every generator that unseeded requests are sampled with.

        vLLM seeds them with 0 at each start, and a memory snapshot keeps their state: two replicas would give the same
        "random" answers in the same order.
        """
        from vllm.utils.torch_utils import set_random_seed

        set_random_seed(seed)
