"""Function calls: their inputs and outputs, and the calls by which clients send, read and cancel them.

Owns the states of an input: queued in a pool, assigned to a task, done. Not supported: blobs, since values are inline.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from modal_proto import api_pb2 as pb

from .functions import Function, Functions
from .ids import Ids
from .rpc import streaming, unary
from .streams import DataStream

if TYPE_CHECKING:
    from .sandbox import Task

FAILURES = (pb.GenericResult.GENERIC_STATUS_FAILURE, pb.GenericResult.GENERIC_STATUS_TIMEOUT)


@dataclass(eq=False)
class Input:
    """One input of a call; `task` is the container that processes it."""

    id: str
    index: int
    call: FunctionCall
    item: pb.FunctionInput
    retry_count: int = 0
    task: Task | None = None
    output: pb.FunctionGetOutputsItem | None = None
    is_web: bool = False

    @property
    def is_done(self) -> bool:
        return self.output is not None


@dataclass(eq=False)
class FunctionCall:
    """A call of one input (`.remote`, `.spawn`, a web request) or of many (`.map`)."""

    id: str
    function: Function
    invocation: int
    inputs: list[Input] = field(default_factory=list)
    outputs: list[pb.FunctionGetOutputsItem] = field(default_factory=list)
    data_in: DataStream = field(default_factory=DataStream)
    data_out: DataStream = field(default_factory=DataStream)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    is_cancelled: bool = False

    def wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    @property
    def unfinished(self) -> int:
        return sum(not item.is_done for item in self.inputs)


class Calls:
    """Calls and inputs by id. The scheduler sets the callbacks `submitted`, `released` and `cancelled`."""

    def __init__(self, ids: Ids, functions: Functions) -> None:
        self._ids, self._functions = ids, functions
        self._calls: dict[str, FunctionCall] = {}
        self._inputs: dict[str, Input] = {}
        self.submitted: Callable[[Input], None]
        self.released: Callable[[Input], None]
        self.cancelled: Callable[[Input, bool], None]

    def create(self, function: Function, invocation: int) -> FunctionCall:
        call = FunctionCall(self._ids.new("fc"), function, invocation)
        self._calls[call.id] = call
        return call

    def submit(self, call: FunctionCall, item: pb.FunctionInput, index: int = 0, *, is_web: bool = False) -> Input:
        """Queue an input of the call in the pool of the call's function."""
        queued = Input(self._ids.new("in"), index, call, item, is_web=is_web)
        call.inputs.append(queued)
        self._inputs[queued.id] = queued
        self.submitted(queued)
        return queued

    def call(self, call_id: str) -> FunctionCall:
        if call := self._calls.get(call_id):
            return call
        raise GRPCError(Status.NOT_FOUND, f"Function call {call_id} not found")

    def finish(self, done: Input, result: pb.GenericResult, data_format: int = 0) -> None:
        """Complete an input, unless its function's retry policy allows another attempt."""
        if done.is_done:
            return
        policy = done.call.function.definition.retry_policy
        if result.status in FAILURES and done.retry_count < policy.retries and not done.call.is_cancelled:
            done.retry_count += 1
            self.released(done)
            asyncio.get_running_loop().call_later(policy.initial_delay_ms / 1000, self.submitted, done)
            return
        done.output = pb.FunctionGetOutputsItem(
            result=result,
            idx=done.index,
            input_id=done.id,
            data_format=data_format,  # type: ignore[arg-type]
            task_id=done.task.id if done.task else "",
            retry_count=done.retry_count,
        )
        done.call.outputs.append(done.output)
        done.call.data_out.bound(None)  # completing a call, such as at a timeout, does not wait for its reader
        self.released(done)
        done.call.wake()

    def cancel(self, call: FunctionCall, *, terminate_containers: bool = False) -> None:
        """Cancel queued inputs, and notify the containers that process the others."""
        call.is_cancelled = True
        call.data_out.bound(None)
        for item in call.inputs:
            if not item.is_done:
                self.cancelled(item, terminate_containers)
            if not item.is_done and (item.task is None or terminate_containers):
                self.finish(item, pb.GenericResult(status=pb.GenericResult.GENERIC_STATUS_TERMINATED))

    @unary("FunctionMap")
    async def map(self, request: pb.FunctionMapRequest, task: Task | None) -> pb.FunctionMapResponse:
        function = self._functions.by_id(request.function_id)
        call = self.create(function, request.function_call_invocation_type)
        return pb.FunctionMapResponse(
            function_call_id=call.id,
            function_call_jwt=call.id,
            retry_policy=function.definition.retry_policy,
            max_inputs_outstanding=1000,
            pipelined_inputs=self._put(call, list(request.pipelined_inputs)),
        )

    @unary("FunctionPutInputs")
    async def put_inputs(self, request: pb.FunctionPutInputsRequest, task: Task | None) -> pb.FunctionPutInputsResponse:
        call = self.call(request.function_call_id)
        return pb.FunctionPutInputsResponse(inputs=self._put(call, list(request.inputs)))

    def _put(self, call: FunctionCall, items: list[pb.FunctionPutInputsItem]) -> list[pb.FunctionPutInputsResponseItem]:
        queued = [self.submit(call, item.input, item.idx) for item in items]
        return [pb.FunctionPutInputsResponseItem(idx=q.index, input_id=q.id, input_jwt=q.id) for q in queued]

    @unary("FunctionFinishInputs")
    async def finish_inputs(self, request: pb.FunctionFinishInputsRequest, task: Task | None) -> Empty:
        self.call(request.function_call_id)
        return Empty()

    @unary("FunctionGetOutputs")
    async def get_outputs(
        self, request: pb.FunctionGetOutputsRequest, task: Task | None
    ) -> pb.FunctionGetOutputsResponse:
        call = self.call(request.function_call_id)
        try:
            async with asyncio.timeout(request.timeout):
                while not (outputs := self._matching(call, request)):
                    await call.changed.wait()
        except TimeoutError:
            outputs = []
        return pb.FunctionGetOutputsResponse(
            outputs=outputs,
            idxs=[output.idx for output in outputs],
            last_entry_id=f"{len(call.outputs)}-0",
            num_unfinished_inputs=call.unfinished,
        )

    def _matching(self, call: FunctionCall, request: pb.FunctionGetOutputsRequest) -> list[pb.FunctionGetOutputsItem]:
        if request.HasField("start_idx"):
            return [out for out in call.outputs if request.start_idx <= out.idx <= request.end_idx]
        return call.outputs[int(request.last_entry_id.split("-")[0] or 0) :]

    @unary("FunctionCallCancel")
    async def cancel_call(self, request: pb.FunctionCallCancelRequest, task: Task | None) -> Empty:
        self.cancel(self.call(request.function_call_id), terminate_containers=request.terminate_containers)
        return Empty()

    @unary("FunctionCallFromId")
    async def from_id(self, request: pb.FunctionCallFromIdRequest, task: Task | None) -> pb.FunctionCallFromIdResponse:
        call = self.call(request.function_call_id)
        metadata = pb.FunctionCallHandleMetadata(app_id=call.function.app.id, function_id=call.function.id)
        return pb.FunctionCallFromIdResponse(function_call_id=call.id, num_inputs=len(call.inputs), metadata=metadata)

    @streaming("FunctionCallGetDataOut")
    async def data_out(self, request: pb.FunctionCallGetDataRequest, task: Task | None) -> AsyncIterator[pb.DataChunk]:
        async for chunk in self.call(request.function_call_id).data_out.after(request.last_index):
            yield chunk

    @streaming("FunctionCallGetDataIn")
    async def data_in(self, request: pb.FunctionCallGetDataRequest, task: Task | None) -> AsyncIterator[pb.DataChunk]:
        async for chunk in self.call(request.function_call_id).data_in.after(request.last_index):
            yield chunk

    @unary("FunctionCallPutDataOut")
    async def put_data_out(self, request: pb.FunctionCallPutDataRequest, task: Task | None) -> Empty:
        call = self.call(request.function_call_id)
        for chunk in request.data_chunks:
            if chunk.data_blob_id:
                raise GRPCError(Status.UNIMPLEMENTED, "The modal plane for tests takes no blobs in an output.")
            await call.data_out.room()
            call.data_out.put(chunk)
        return Empty()

    @unary("FunctionPutOutputs")
    async def put_outputs(self, request: pb.FunctionPutOutputsRequest, task: Task | None) -> Empty:
        for output in request.outputs:
            done = self._inputs[output.input_id]
            if done.task is task and done.retry_count == output.retry_count and not _is_reassigned(done, output):
                self.finish(done, output.result, output.data_format)
        return Empty()


def _is_reassigned(done: Input, output: pb.FunctionPutOutputsItem) -> bool:
    """Tell whether a preempted container reports its inputs as terminated: another container has them by then."""
    terminated = output.result.status == pb.GenericResult.GENERIC_STATUS_TERMINATED
    return terminated and done.task is not None and done.task.preempted and not done.call.is_cancelled
