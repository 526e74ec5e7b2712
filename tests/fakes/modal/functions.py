"""Functions and classes: definitions, handles, bindings of parameters and options.

Owns definitions, which are staged until their app is published. Every distinct set of parameters and options of a class
is a function of its own (a pool), as on Modal: the serialized set identifies it, its order included. Unknown GPU types
are an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grpclib import GRPCError, Status
from modal._serialization import deserialize_proto_params
from modal_proto import api_pb2 as pb

from .ids import Ids
from .options import with_options
from .rpc import unary

if TYPE_CHECKING:
    from .apps import App, Apps
    from .sandbox import Task
    from .volumes import Volumes
    from .web_endpoints import WebEndpoints

GPU_TYPES = (
    *("T4", "L4", "A10", "A10G", "L40S", "A100", "A100-40GB", "A100-80GB"),
    *("RTX-PRO-6000", "H100", "H100!", "H200", "B200", "B200+", "B300"),
)
MAX_MESSAGE_BYTES = 64 * 2**20  # below it a client sends values inline, so no blob storage is needed


@dataclass(eq=False)
class Function:
    """A function, the service function of a class (tag `Server.*`), or one of its pools (`base_id` is set)."""

    id: str
    app: App
    definition: pb.Function
    staged: pb.Function | None = None
    base_id: str | None = None
    params: bytes = b""
    options: pb.FunctionOptions | None = None

    @property
    def tag(self) -> str:
        return self.definition.function_name.removesuffix(".*")

    @property
    def newest(self) -> pb.Function:
        return self.staged or self.definition

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameters that the pool was bound with; a class without parameters is bound with an empty pickle."""
        info = self.definition.class_parameter_info
        return dict(deserialize_proto_params(self.params)) if self.params and info.schema else {}

    @property
    def gpu(self) -> str | None:
        return gpu_of(self.definition)


def gpu_of(definition: pb.Function) -> str | None:
    """Return a function's GPUs, as `H100:1`."""
    config = definition.resources.gpu_config
    return f"{config.gpu_type}:{config.count or 1}" if config.gpu_type else None


class OfFunction:
    """Properties of a pool or a container that come from its function."""

    function: Function

    @property
    def app(self) -> str:
        return self.function.app.name

    @property
    def tag(self) -> str:
        return self.function.tag

    @property
    def parameters(self) -> dict[str, Any]:
        return self.function.parameters

    @property
    def gpu(self) -> str | None:
        return self.function.gpu


class Functions:
    """Functions by id, their bindings, and classes."""

    def __init__(self, ids: Ids, volumes: Volumes, web_endpoints: WebEndpoints) -> None:
        self._ids, self.volumes, self._web_endpoints = ids, volumes, web_endpoints
        self._by_id: dict[str, Function] = {}
        self._bound: dict[tuple[str, bytes, bytes], str] = {}
        self._classes: dict[str, str] = {}
        self.apps: Apps

    def by_id(self, function_id: str) -> Function:
        if function := self._by_id.get(function_id):
            return function
        raise GRPCError(Status.NOT_FOUND, f"Function {function_id} not found")

    def find(self, function_id: str) -> Function | None:
        return self._by_id.get(function_id)

    def promote(self, function_id: str) -> pb.Function:
        """Activate the staged definition; existing handles of its pools use the new version."""
        function = self.by_id(function_id)
        if function.staged is not None:
            function.definition, function.staged = function.staged, None
        for pool in (other for other in self._by_id.values() if other.base_id == function_id):
            pool.definition = with_options(function.definition, pool.options or pb.FunctionOptions())
        return function.definition

    def forget(self, function_ids: Iterable[str]) -> None:
        for function_id in function_ids:
            self._by_id.pop(function_id, None)
        self._bound = {key: bound for key, bound in self._bound.items() if bound in self._by_id}

    def metadata(self, function_id: str) -> pb.FunctionHandleMetadata:
        """Describe a function as a handle in a client: methods, parameters, web URLs."""
        function = self.by_id(function_id)
        definition, endpoint_of = function.newest, function.base_id or function.id
        metadata = self._handle(
            definition, function, self._web_endpoints.url(endpoint_of, "", definition.webhook_config)
        )
        metadata.definition_id = f"de-{function_id[3:]}"
        metadata.class_parameter_info.CopyFrom(definition.class_parameter_info)
        metadata.is_method = definition.is_method
        metadata.base_function_id = function.base_id or ""
        for name, method in definition.method_definitions.items():
            url = self._web_endpoints.url(endpoint_of, name, method.webhook_config)
            handle = self._handle(method, function, url)
            handle.is_method, handle.use_method_name = True, name
            metadata.method_handle_metadata[name].CopyFrom(handle)
        return metadata

    def _handle(
        self, described: pb.Function | pb.MethodDefinition, function: Function, url: str
    ) -> pb.FunctionHandleMetadata:
        return pb.FunctionHandleMetadata(
            function_name=described.function_name,
            function_type=described.function_type,
            web_url=url,
            app_id=function.app.id,
            function_schema=described.function_schema,
            supported_input_formats=described.supported_input_formats,
            supported_output_formats=described.supported_output_formats,
            max_object_size_bytes=MAX_MESSAGE_BYTES,
            max_async_object_size_bytes=MAX_MESSAGE_BYTES,
        )

    def _stage(self, function_id: str, app_id: str, definition: pb.Function) -> Function:
        function = self._by_id.get(function_id)
        if function is None:
            function = Function(function_id or self._ids.new("fu"), self.apps.by_id(app_id), definition)
            self._by_id[function.id] = function
        function.staged = definition
        return function

    @unary("FunctionPrecreate")
    async def precreate(self, request: pb.FunctionPrecreateRequest, task: Task | None) -> pb.FunctionPrecreateResponse:
        definition = pb.Function(
            function_name=request.function_name,
            function_type=request.function_type,
            function_schema=request.function_schema,
            supported_input_formats=request.supported_input_formats,
            supported_output_formats=request.supported_output_formats,
            method_definitions=request.method_definitions,
        )
        if request.HasField("webhook_config"):
            definition.webhook_config.CopyFrom(request.webhook_config)
        function = self._stage(request.existing_function_id, request.app_id, definition)
        return pb.FunctionPrecreateResponse(function_id=function.id, handle_metadata=self.metadata(function.id))

    @unary("FunctionCreate")
    async def create(self, request: pb.FunctionCreateRequest, task: Task | None) -> pb.FunctionCreateResponse:
        data = pb.FunctionData()
        data.CopyFrom(request.function_data)
        if not data.ranked_functions:
            data.ranked_functions.add(rank=0).function.CopyFrom(request.function)
        definition = data.ranked_functions[0].function
        self._check_gpu(definition.resources.gpu_config)
        if definition.experimental_options.get("enable_gpu_snapshot", "").lower() in ("true", "1"):
            definition._experimental_enable_gpu_snapshot = True  # a client sends the text, containers read the flag
        function = self._stage(request.existing_function_id, request.app_id, definition)
        await self._open_web_endpoints(function.id, definition)
        return pb.FunctionCreateResponse(
            function_id=function.id,
            function=definition,
            function_data=data,
            handle_metadata=self.metadata(function.id),
        )

    async def _open_web_endpoints(self, function_id: str, definition: pb.Function) -> None:
        if definition.webhook_config.type:
            definition.web_url = await self._web_endpoints.open(function_id, "", definition.webhook_config)
        for name, method in definition.method_definitions.items():
            if method.webhook_config.type:
                method.web_url = await self._web_endpoints.open(function_id, name, method.webhook_config)

    def _check_gpu(self, config: pb.GPUConfig) -> None:
        if config.gpu_type and config.gpu_type not in GPU_TYPES:
            text = f"Unknown GPU type '{config.gpu_type}'. Known: {', '.join(GPU_TYPES)}"
            raise GRPCError(Status.INVALID_ARGUMENT, text)

    @unary("FunctionBindParams")
    async def bind_params(
        self, request: pb.FunctionBindParamsRequest, task: Task | None
    ) -> pb.FunctionBindParamsResponse:
        bound = self.bind(request)
        return pb.FunctionBindParamsResponse(bound_function_id=bound.id, handle_metadata=self.metadata(bound.id))

    def bind(self, request: pb.FunctionBindParamsRequest) -> Function:
        """Return the pool of these parameters and options; the same request is the same pool."""
        base = self.by_id(request.function_id)
        if not base.definition.class_parameter_info.schema and not request.HasField("function_options"):
            return base
        key = (request.function_id, request.serialized_params, request.function_options.SerializeToString())
        if key not in self._bound:
            definition = with_options(base.definition, request.function_options)
            self._check_gpu(definition.resources.gpu_config)
            bound = Function(
                self._ids.new("fu"), base.app, definition, base_id=base.id, params=request.serialized_params
            )
            bound.options = request.function_options if request.HasField("function_options") else None
            self._by_id[bound.id], self._bound[key] = bound, bound.id
        return self._by_id[self._bound[key]]

    @unary("FunctionListVariants")
    async def list_variants(
        self, request: pb.FunctionListVariantsRequest, task: Task | None
    ) -> pb.FunctionListVariantsResponse:
        variants = [function for function in self._by_id.values() if function.base_id == request.function_id]
        infos = [
            pb.FunctionVariantInfo(function_id=v.id, serialized_params=v.params, function_options=v.options)
            for v in variants[: request.limit or None]
        ]
        return pb.FunctionListVariantsResponse(infos=infos)

    @unary("ClassCreate")
    async def create_class(self, request: pb.ClassCreateRequest, task: Task | None) -> pb.ClassCreateResponse:
        class_id = request.existing_class_id or self._ids.new("cs")
        self._classes[class_id] = request.app_id
        return pb.ClassCreateResponse(class_id=class_id, handle_metadata=pb.ClassHandleMetadata())

    @unary("ClassGet")
    async def get_class(self, request: pb.ClassGetRequest, task: Task | None) -> pb.ClassGetResponse:
        class_id = self._published(request, "class_ids", "Class")
        return pb.ClassGetResponse(class_id=class_id, handle_metadata=pb.ClassHandleMetadata())

    @unary("FunctionGet")
    async def get_function(self, request: pb.FunctionGetRequest, task: Task | None) -> pb.FunctionGetResponse:
        function_id = self._published(request, "function_ids", "Function")
        data = pb.FunctionData()
        data.ranked_functions.add().function.CopyFrom(self.by_id(function_id).definition)
        metadata = self.metadata(function_id)
        return pb.FunctionGetResponse(function_id=function_id, handle_metadata=metadata, function=data)

    def _published(self, request: pb.ClassGetRequest | pb.FunctionGetRequest, kind: str, label: str) -> str:
        app = self.apps.deployed(request.app_name)
        if app is None:
            raise GRPCError(Status.NOT_FOUND, f"App '{request.app_name}' not found in environment 'main'")
        ids: dict[str, str] = getattr(app, kind)
        if request.object_tag not in ids:
            text = f"{label} '{request.object_tag}' not found in app '{request.app_name}'; it has {sorted(ids)}"
            raise GRPCError(Status.NOT_FOUND, text)
        return ids[request.object_tag]
