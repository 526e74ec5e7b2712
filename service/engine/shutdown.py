"""The shutdown budget: how long each step of the end of a replica may take. Every duration of an end stands here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ShutdownBudget:
    """Seconds for each step, in the order in which they come.

    Attributes:
        limit_s: After this the platform kills whatever is left: 30 s on Modal; on one machine what a user waits.
        drain_s: Requests in flight may finish; new ones are refused.
        cancel_s: What is left is cancelled, and ends with an error event of its protocol.
        terminate_s: The engine may exit after the command `terminate`.
        vllm_s: Of these, vLLM's own `--shutdown-timeout`: what is in flight has ended before that command, and with 0
            vLLM hung in 3 of 6 runs.
        kill_s: The process group was killed with SIGKILL, and is waited for.
        flush_s: The results of the boot may still be on their way to the volumes.
        gateway_s: The gateway on this machine passes on the ends of the engines' streams. On Modal the gateway is a
            container of its own.

    Raises:
        ValueError: The steps together take as long as the limit, or longer.
    """

    limit_s: float
    drain_s: float
    cancel_s: float = 1.0
    terminate_s: float = 2.5
    vllm_s: int = 1
    kill_s: float = 5.0
    flush_s: float = 0.0
    gateway_s: int = 0

    def __post_init__(self) -> None:
        if self.total_s >= self.limit_s:
            raise ValueError(f"The steps of a shutdown take {self.total_s:g} s, and the limit is {self.limit_s:g} s.")
        if self.vllm_s >= self.terminate_s:
            raise ValueError(f"vLLM's {self.vllm_s} s are part of terminate_s={self.terminate_s:g}; lower them.")

    @property
    def total_s(self) -> float:
        """What all steps take together, at most."""
        return self.drain_s + self.cancel_s + self.terminate_s + self.kill_s + self.flush_s + self.gateway_s


# Modal gives a container 30 s, a preempted one as well. The rest of them is for copying the compile caches out.
MODAL_SHUTDOWN = ShutdownBudget(limit_s=30, drain_s=15, flush_s=1)
# After Ctrl-C all processes have ended within 10 s, as a rule: no step but the drain ever takes its whole time.
LOCAL_SHUTDOWN = ShutdownBudget(limit_s=16, drain_s=6, gateway_s=1)
