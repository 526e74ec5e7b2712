"""The scheduler: starts containers where inputs wait, assigns inputs, stops idle containers, handles their deaths.

Owns pools and tasks. A container that dies before it was ready fails the inputs that wait in its pool with its own
error, as a crash loop does on Modal. One that dies later fails the inputs that it was processing, and a fresh container
takes the others. The inputs of a preempted container are assigned again. No process outlives `close`.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from google.protobuf.empty_pb2 import Empty
from modal._runtime.gpu_memory_snapshot import SNAPSHOT_RESTORE_FAILED_EXIT_CODE
from modal_proto import api_pb2 as pb

from .calls import Calls, Input
from .functions import Function, Functions
from .launch import Launcher
from .pools import Pool
from .rpc import unary
from .sandbox import Task, TaskState

if TYPE_CHECKING:
    from .apps import App

HEARTBEAT_HOLD_S = 14.5  # the client repeats a heartbeat after 15 s, and gives up after 15.1 s
DRAIN_GRACE_S = 35.0
PREEMPTION_GRACE_S = 30.0
DEFAULT_TIMEOUT_S = 300
MAX_BACKOFF_S = 30.0


class Scheduler:
    """Pools by function id, and all tasks, dead ones included."""

    def __init__(self, functions: Functions, calls: Calls, launcher: Launcher) -> None:
        self._functions, self._calls, self._launcher = functions, calls, launcher
        self.pools: dict[str, Pool] = {}
        self.tasks: list[Task] = []
        self._jobs: set[asyncio.Task[None]] = set()
        self._closed = False
        calls.submitted, calls.released, calls.cancelled = self.submit, self.release, self.cancel

    def pool(self, function: Function) -> Pool:
        return self.pools.setdefault(function.id, Pool(function))

    # inputs

    def submit(self, item: Input) -> None:
        pool = self.pool(item.call.function)
        pool.enqueue(item)
        self._wake(pool)
        self.scale(pool)

    def release(self, item: Input) -> None:
        """Free the slot of an input that is done."""
        pool = self.pool(item.call.function)
        if item in pool.queue:
            pool.queue.remove(item)
        if item.task and item in item.task.inputs:
            item.task.inputs.remove(item)
            item.task.inputs_served += 1
            self._wake(pool)
            self.watch_idle(pool, item.task)

    def cancel(self, item: Input, terminate: bool) -> None:
        if item.task is None:
            return
        if terminate:
            self._run(item.task.interrupt_within(PREEMPTION_GRACE_S))
        item.task.cancelled_inputs.append(item.id)
        item.task.wake()

    def _wake(self, pool: Pool) -> None:
        for task in pool.tasks:
            task.wake()

    # containers

    def scale(self, pool: Pool) -> None:
        """Start the containers that the pool needs."""
        for _ in range(0 if self._closed else pool.missing()):
            task = self._launcher.create(pool.function, with_snapshot=not pool.skips_snapshot)
            pool.skips_snapshot = False
            task.on_stop, task.on_death = self._replace, self._bury
            pool.tasks.append(task)
            self.tasks.append(task)
            self._run(self._launcher.boot(task)).add_done_callback(functools.partial(self._check_boot, task))
            self._limit_startup(task)

    def _limit_startup(self, task: Task) -> None:
        definition = task.definition
        limit = definition.startup_timeout_secs or definition.timeout_secs or DEFAULT_TIMEOUT_S

        def check() -> None:
            if task.state is TaskState.STARTING:
                status = pb.GenericResult.GENERIC_STATUS_TIMEOUT
                text = f"Container {task.id} did not start within its startup timeout of {limit}s"
                task.result = pb.GenericResult(status=status, exception=text)
                self._run(task.end())

        asyncio.get_running_loop().call_later(limit, check)

    def _limit_input(self, item: Input) -> None:
        attempt, limit = item.retry_count, item.call.function.definition.timeout_secs or DEFAULT_TIMEOUT_S

        def check() -> None:
            if not item.is_done and item.retry_count == attempt and item.task is not None:
                self.cancel(item, terminate=False)
                text = f"Task's current input {item.id} hit its timeout of {limit}s"
                status = pb.GenericResult.GENERIC_STATUS_TIMEOUT
                self._calls.finish(item, pb.GenericResult(status=status, exception=text))

        asyncio.get_running_loop().call_later(limit, check)

    def watch_idle(self, pool: Pool, task: Task) -> None:
        """Stop the container if it is still idle, without a break, after the scaledown window."""
        served = task.inputs_served
        window = pool.autoscaler.scaledown_window

        def check() -> None:
            if task.inputs_served == served and pool.spare(task):
                self._run(task.stop_within(DRAIN_GRACE_S))

        if not task.inputs:
            asyncio.get_running_loop().call_later(window, check)

    def _replace(self, task: Task) -> None:
        """Scale after a container was asked to stop: it no longer counts, and waiting inputs may need another."""
        self.scale(self.pool(task.function))

    def _bury(self, task: Task) -> None:
        pool = self.pool(task.function)
        left, task.inputs = task.inputs, []
        if task.restore_failed or task.exit_code == SNAPSHOT_RESTORE_FAILED_EXIT_CODE:
            pool.skips_snapshot = True
        elif not task.preempted and not task.stopping.is_set():
            left += self._doomed(pool, task)
            self._fail(left, task)
            left = []
        for item in left:
            self._assign_again(item)
        self._scale_after(pool, task)

    def _scale_after(self, pool: Pool, task: Task) -> None:
        """Replace a dead container where one is needed, with growing delays in a crash loop under `min_containers`."""
        crashed = task.ready_at is None and not task.stopping.is_set() and not pool.skips_snapshot
        pool.failed_boots = pool.failed_boots + 1 if crashed else 0
        delay_s = min(2.0**pool.failed_boots, MAX_BACKOFF_S) if crashed and not pool.queue else 0.0
        asyncio.get_running_loop().call_later(delay_s, self.scale, pool)

    def _doomed(self, pool: Pool, task: Task) -> list[Input]:
        """Return the queued inputs that fail with a container that never got ready: all, unless another one runs."""
        return list(pool.queue) if task.ready_at is None and not pool.live else []

    def _fail(self, items: list[Input], task: Task) -> None:
        text = f"Container {task.id} exited with code {task.exit_code}"
        crash = pb.GenericResult(status=pb.GenericResult.GENERIC_STATUS_INTERNAL_FAILURE, exception=text)
        for item in items:
            self._calls.finish(item, task.result or crash)

    def _assign_again(self, item: Input) -> None:
        if item.is_web and len(item.call.data_out):
            text = "The container was preempted in the middle of the response"
            lost = pb.GenericResult(status=pb.GenericResult.GENERIC_STATUS_INTERNAL_FAILURE, exception=text)
            self._calls.finish(item, lost)
        else:
            item.task = None
            self.pool(item.call.function).queue.appendleft(item)

    def _check_boot(self, task: Task, job: asyncio.Task[None]) -> None:
        """Record the failure of a container that the plane could not start, and fail the inputs that wait for it."""
        if job.cancelled() or (error := job.exception()) is None:
            return
        text = f"The plane could not start container {task.id}: {error!r}"
        self._launcher.transcript.failures.append(text)
        status = pb.GenericResult.GENERIC_STATUS_INTERNAL_FAILURE
        task.result = pb.GenericResult(status=status, exception=text)
        task.bury()

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        job = asyncio.ensure_future(coroutine)
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        return job

    async def stop_app(self, app: App) -> None:
        """End every container of the app, its exit hooks run."""
        live = [task for task in self.tasks if task.function.app is app and task.state is not TaskState.DEAD]
        await asyncio.gather(*(task.stop_within(DRAIN_GRACE_S) for task in live))

    def running(self, app: App) -> int:
        """Return how many containers of the app are live."""
        return sum(task.is_live for task in self.tasks if task.function.app is app)

    async def published(self, app: App) -> None:
        """Stop containers and drop autoscaler updates of the previous version; start those of `min_containers`."""
        current = set(app.function_ids.values())
        for pool in self.pools.values():
            if pool.function.app is app:
                pool.overrides.Clear()
        for task in self.tasks:
            if task.function.app is app and task.is_live:
                self._run(task.stop_within(DRAIN_GRACE_S))
        for function_id in current if app.is_deployed else ():
            function = self._functions.by_id(function_id)
            if not function.definition.class_parameter_info.schema:
                self.scale(self.pool(function))

    async def close(self) -> None:
        """Kill every container; none of their processes is left when this returns."""
        self._closed = True
        jobs = list(self._jobs)  # boots in progress first: the processes that they started are killed next
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        await asyncio.gather(*(task.end() for task in self.tasks))

    # calls of containers

    @unary("ContainerHello")
    async def hello(self, request: Empty, task: Task) -> Empty:
        task.note_namespace()
        return Empty()

    @unary("ContainerHeartbeat")
    async def heartbeat(self, request: pb.ContainerHeartbeatRequest, task: Task) -> pb.ContainerHeartbeatResponse:
        try:
            async with asyncio.timeout(HEARTBEAT_HOLD_S):
                while not task.cancelled_inputs:
                    await task.changed.wait()
        except TimeoutError:
            return pb.ContainerHeartbeatResponse()
        ids, task.cancelled_inputs = task.cancelled_inputs, []
        return pb.ContainerHeartbeatResponse(cancel_input_event=pb.CancelInputEvent(input_ids=ids))

    @unary("FunctionGetInputs")
    async def get_inputs(self, request: pb.FunctionGetInputsRequest, task: Task) -> pb.FunctionGetInputsResponse:
        pool = self.pool(task.function)
        if task.state is TaskState.STARTING:
            task.become_ready()
            self.watch_idle(pool, task)
        while not task.stopping.is_set():
            if item := pool.take(task):
                self._limit_input(item)
                return pb.FunctionGetInputsResponse(inputs=[_delivery(item)])
            await task.changed.wait()
        return pb.FunctionGetInputsResponse(inputs=[pb.FunctionGetInputsItem(kill_switch=True)])

    @unary("FunctionGetDynamicConcurrency")
    async def concurrency(
        self, request: pb.FunctionGetDynamicConcurrencyRequest, task: Task
    ) -> pb.FunctionGetDynamicConcurrencyResponse:
        return pb.FunctionGetDynamicConcurrencyResponse(concurrency=request.max_concurrency)

    @unary("TaskResult")
    async def result(self, request: pb.TaskResultRequest, task: Task) -> Empty:
        task.result = request.result
        return Empty()

    @unary("ContainerStop")
    async def stop(self, request: pb.ContainerStopRequest, task: Task | None) -> pb.ContainerStopResponse:
        stopped = next((t for t in self.tasks if request.task_id in (t.id, *t.former_ids)), None)
        if stopped is not None and stopped.state is not TaskState.DEAD:
            self._run(stopped.stop_within(DRAIN_GRACE_S))
        return pb.ContainerStopResponse()


def _delivery(item: Input) -> pb.FunctionGetInputsItem:
    return pb.FunctionGetInputsItem(
        input_id=item.id,
        function_call_id=item.call.id,
        input=item.item,
        retry_count=item.retry_count,
        function_call_invocation_type=item.call.invocation,  # type: ignore[arg-type]
    )
