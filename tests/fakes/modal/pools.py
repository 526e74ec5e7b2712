"""A pool: the queue and the containers of one function with one set of parameters and options.

Computes how many containers it needs; the scheduler starts and stops them.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from modal_proto import api_pb2 as pb

from .calls import Input
from .functions import Function, OfFunction
from .sandbox import Task, TaskState

DEFAULT_SCALEDOWN_WINDOW_S = 60
UNLIMITED = 1000


@dataclass(eq=False)
class Pool(OfFunction):
    """Queue, containers and autoscaler overrides of one function."""

    function: Function
    queue: deque[Input] = field(default_factory=deque)
    tasks: list[Task] = field(default_factory=list)
    overrides: pb.AutoscalerSettings = field(default_factory=pb.AutoscalerSettings)
    most_queued_cold: int = 0  # inputs at once while no container took any
    failed_boots: int = 0  # in a row
    skips_snapshot: bool = False  # a restore failed: the next container boots without one

    @property
    def queued(self) -> int:
        return len(self.queue)

    @property
    def live(self) -> list[Task]:
        return [task for task in self.tasks if task.is_live]

    @property
    def concurrency(self) -> int:
        """Inputs that one container processes at once."""
        return self.function.definition.max_concurrent_inputs or 1

    @property
    def autoscaler(self) -> pb.AutoscalerSettings:
        """The class's settings with the overrides of `autoscaler.update`; a parametrized pool ignores its minimum."""
        definition = self.function.definition
        settings = pb.AutoscalerSettings(
            min_containers=0 if self.function.base_id else definition.warm_pool_size,
            max_containers=definition.concurrency_limit,
            buffer_containers=definition._experimental_buffer_containers,
            scaledown_window=definition.task_idle_timeout_secs or DEFAULT_SCALEDOWN_WINDOW_S,
        )
        settings.MergeFrom(self.overrides)
        return settings

    def enqueue(self, item: Input) -> None:
        """Let an input wait."""
        item.task = None
        self.queue.append(item)
        if not any(task.state is TaskState.READY for task in self.tasks):
            self.most_queued_cold = max(self.most_queued_cold, self.queued)

    def missing(self) -> int:
        """Return how many more containers the queue, the minimum and the buffer require."""
        settings, definition = self.autoscaler, self.function.definition
        per_container = definition.target_concurrent_inputs or self.concurrency
        demand = self.queued + sum(len(task.inputs) for task in self.live)
        wanted = math.ceil(demand / per_container) + (settings.buffer_containers if demand else 0)
        wanted = min(max(wanted, settings.min_containers), settings.max_containers or UNLIMITED)
        return max(0, wanted - len(self.live))

    def spare(self, task: Task) -> bool:
        """Tell whether an idle container may stop."""
        settings = self.autoscaler
        busy = any(other.inputs for other in self.live)
        keep = settings.min_containers + (settings.buffer_containers if busy else 0)
        return task.is_live and not task.inputs and len(self.live) > keep

    def take(self, task: Task) -> Input | None:
        """Assign the next input to the container, if it has a slot and the queue has one."""
        if not self.queue or len(task.inputs) >= self.concurrency:
            return None
        taken = self.queue.popleft()
        taken.task = task
        task.inputs.append(taken)
        return taken
