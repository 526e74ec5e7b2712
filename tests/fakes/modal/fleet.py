"""The calls by which clients list containers, read statistics, and read or set the autoscaler's settings."""

from __future__ import annotations

from grpclib import GRPCError, Status
from modal_proto import api_pb2 as pb

from .containers import Scheduler
from .functions import Functions
from .rpc import unary
from .sandbox import Task, TaskState


class Fleet:
    """Answers from the scheduler's state; changes only the autoscaler's overrides."""

    def __init__(self, scheduler: Scheduler, functions: Functions) -> None:
        self._scheduler, self._functions = scheduler, functions

    @unary("TaskGetInfo")
    async def info(self, request: pb.TaskGetInfoRequest, task: Task | None) -> pb.TaskGetInfoResponse:
        found = next((t for t in self._scheduler.tasks if request.task_id in (t.id, *t.former_ids)), None)
        if found is None:
            raise GRPCError(Status.NOT_FOUND, f"Container {request.task_id} not found")
        info = pb.TaskInfo(id=found.id, started_at=found.started_at, enqueued_at=found.started_at)
        if found.state is TaskState.DEAD:
            info.finished_at = found.finished_at
        return pb.TaskGetInfoResponse(app_id=found.function.app.id, info=info)

    @unary("TaskList")
    async def list(self, request: pb.TaskListRequest, task: Task | None) -> pb.TaskListResponse:
        listed = [t for t in self._scheduler.tasks if t.is_live and request.app_id in ("", t.function.app.id)]
        stats = [
            pb.TaskStats(task_id=t.id, app_id=t.function.app.id, app_description=t.app, started_at=t.started_at)
            for t in listed
        ]
        return pb.TaskListResponse(tasks=stats)

    @unary("FunctionUpdateSchedulingParams")
    async def update(
        self, request: pb.FunctionUpdateSchedulingParamsRequest, task: Task | None
    ) -> pb.FunctionUpdateSchedulingParamsResponse:
        pool = self._scheduler.pool(self._functions.by_id(request.function_id))
        pool.overrides.MergeFrom(request.settings)
        self._scheduler.scale(pool)
        for idle in pool.live:
            self._scheduler.watch_idle(pool, idle)
        return pb.FunctionUpdateSchedulingParamsResponse(current_settings=pool.autoscaler)

    @unary("FunctionGetSchedulingParams")
    async def settings(
        self, request: pb.FunctionGetSchedulingParamsRequest, task: Task | None
    ) -> pb.FunctionGetSchedulingParamsResponse:
        pool = self._scheduler.pool(self._functions.by_id(request.function_id))
        configuration = pb.AutoscalerConfiguration(settings=pool.autoscaler)
        return pb.FunctionGetSchedulingParamsResponse(autoscaler_configuration=configuration)

    @unary("FunctionGetCurrentStats")
    async def stats(self, request: pb.FunctionGetCurrentStatsRequest, task: Task | None) -> pb.FunctionStats:
        pool = self._scheduler.pool(self._functions.by_id(request.function_id))
        running = sum(len(live.inputs) for live in pool.live)
        return pb.FunctionStats(backlog=pool.queued, num_total_tasks=len(pool.live), num_running_inputs=running)
