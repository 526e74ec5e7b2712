"""The engine's main module: import, hold if set to, then become vLLM's own API server in the same process.

Run as `python -m vllm_service.main <arguments of vllm serve>`. What it imports before the hold is everything that a
process without a GPU may import: vLLM decides its platform at import and keeps it, so under a snapshot that is taken
where no GPU is visible vLLM itself comes after the hold.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys

from vllm_service import (
    bad_requests,
    end_signals,
    first_error,
    fork_start,
    gpu_flags,
    memory_ceiling,
    parent_pipe,
    request_heads,
)
from vllm_service.events import Event

HOLD_VARIABLE = "ENGINE_HOLD"  # "", "imported" or "asleep"
HANG_VARIABLE = "ENGINE_HANG_S"  # how long the parent lets a ready engine be without a heartbeat
IMPORTS_VARIABLE = "ENGINE_IMPORTS"  # "all" or "neutral": may vLLM be imported before the hold?

# What vLLM imports of others. None of these asks torch for a GPU (a test listens). xgrammar does, while it is imported,
# and torch.utils.cpp_extension, where torch is built for CUDA and a toolkit is installed.
NEUTRAL = (
    *("torch", "torch._inductor.lowering", "torch._inductor.compile_fx"),
    *("transformers", "transformers.modeling_gguf_pytorch_utils", "transformers.models.auto.image_processing_auto"),
    *("tokenizers", "mistral_common.tokens.tokenizers.base", "compressed_tensors", "llguidance"),
    *(
        "fastapi",
        "uvicorn",
        "uvloop",
        "pydantic.v1",
        "prometheus_client",
        "model_hosting_container_standards.sagemaker",
    ),
    *("openai.types.responses", "openai_harmony", "opentelemetry.exporter.otlp.proto.grpc.trace_exporter"),
)
SERVER = (
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.entrypoints.anthropic.api_router",
    "vllm.parser.engine.registered_adapters",
)
CPU_WORKER = (  # what the forked engine core would import by itself; on a GPU not tried
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.model_executor.layers.quantization.online.base",
)


def main() -> None:
    """Import, hold, serve."""
    end_signals.block()  # before any thread starts
    pipe = parent_pipe.current()
    if pipe is None:
        sys.exit("vllm_service.main is started by the service, with its pipes; to run vLLM alone use `vllm serve`.")
    pipe.emit(Event.STARTED, pid=os.getpid())
    memory_ceiling.prefer_as_victim()
    gc.disable()  # what imports create stays: scanning it again and again takes a tenth of their time
    first_error.enable()
    _import(NEUTRAL)
    if os.environ.get(IMPORTS_VARIABLE) == "all":
        _import_server()
    gc.freeze()
    gc.enable()
    pipe.emit(Event.IMPORTED)
    if os.environ.get(HOLD_VARIABLE) == "imported":
        pipe.wait_for_release()
    serve(sys.argv[1:])


def _import(names: tuple[str, ...]) -> None:
    for name in names:
        importlib.import_module(name)


def _import_server() -> None:
    _import(SERVER)
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _import(CPU_WORKER)


def serve(argv: list[str]) -> None:
    """Run vLLM's API server with these arguments, as its own command does."""
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    fork_start.enable_fork()
    bad_requests.enable()
    request_heads.enable()
    memory_ceiling.close_at_bodies_that_do_not_fit()
    cli_env_setup()
    if found := current_platform.get_device_capability():  # makes no CUDA context
        argv = gpu_flags.supported(argv, os.environ.get(gpu_flags.VARIABLE, ""), (found.major, found.minor))
    # What an entry's extra_args may not say is told by whole names.
    args = make_arg_parser(FlexibleArgumentParser(prog="vllm serve", allow_abbrev=False)).parse_args(argv)
    validate_parsed_serve_args(args)
    if pipe := parent_pipe.current():
        pipe.emit(Event.BUILDING)
    uvloop.run(run_server(args))


if __name__ == "__main__":
    main()
