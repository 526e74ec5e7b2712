"""Asks vLLM's CUDA build what it would do on a GPU that is not here: run with the engine's CUDA environment.

It claims a GPU, with a platform of its own in vLLM and a driver that knows no device (driver_stub.c on
LD_LIBRARY_PATH), reads command lines from its input, and lets vLLM's own code parse each, make the engine's
configuration, and build the model without memory (torch's `meta` device). Building is where vLLM chooses attention
backends and kernels; nothing is computed.

Usage: python claimed_gpu.py GPU < cases.jsonl > answers.jsonl, where GPU is a JSON object with `name`, `capability` as
[major, minor], `memory_gb` and `compute_units`. A case has `id`, `argv`, `bounds` (of gpu_flags) and `build`, whether
the model is built too; an answer has its `id` and what `answer` returns.
"""

from __future__ import annotations

import enum
import json
import logging
import sys
import traceback
from typing import Any, ClassVar

import torch
import torch.distributed
import vllm.platforms
import vllm.utils.torch_utils
from vllm.platforms.cuda import NonNvmlCudaPlatform
from vllm.platforms.interface import DeviceCapability


class ClaimedGpu(NonNvmlCudaPlatform):
    """vLLM's CUDA platform, which says that eight of one GPU are here."""

    claim: ClassVar[dict[str, Any]]

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:  # noqa: ARG003
        """The claim's."""
        return DeviceCapability(*cls.claim["capability"])

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:  # noqa: ARG003
        """The claim's."""
        return str(cls.claim["name"])

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:  # noqa: ARG003
        """The claim's, in bytes."""
        return int(cls.claim["memory_gb"] * 10**9)

    @classmethod
    def is_fully_connected(cls, physical_device_ids: list[int]) -> bool:  # noqa: ARG003
        """As on Modal's machines."""
        return True

    @classmethod
    def device_count(cls) -> int:
        """As many as one container can have."""
        return 8

    @classmethod
    def current_device(cls) -> torch.device:
        """Where a layer makes a tensor that it does not leave to torch's default device."""
        return torch.device("meta")

    @classmethod
    def num_compute_units(cls, device_id: int = 0) -> int:  # noqa: ARG003
        """The claim's."""
        return int(cls.claim["compute_units"])


class Warnings(logging.Handler):
    """Keeps what vLLM warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message."""
        self.lines.append(record.getMessage())


def main() -> None:
    """Answer each case of the input with a line of the output."""
    claim_gpu(json.loads(sys.argv[1]))
    warnings = Warnings()
    vllm.utils.torch_utils._aux_stream = object()  # else vLLM makes one, which needs a GPU
    output = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        case = json.loads(line)
        warnings.lines.clear()
        logging.getLogger("vllm").addHandler(warnings)
        answered = answer(case["argv"], case["bounds"], build=case["build"])
        answered |= {"id": case["id"], "warnings": list(warnings.lines)}
        output.write(json.dumps(answered) + "\n")
        output.flush()


def claim_gpu(claim: dict[str, Any]) -> None:
    """Let vLLM find this GPU."""
    ClaimedGpu.claim = claim
    vllm.platforms._current_platform = ClaimedGpu()


def answer(argv: list[str], bounds: str, *, build: bool) -> dict[str, Any]:
    """Return what vLLM chose, the names of its classes for `attention`, `linear` and `moe`; or `error`, a traceback."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm_service import gpu_flags

    try:
        parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve", allow_abbrev=False))
        args = parser.parse_args(gpu_flags.supported(argv, bounds, tuple(ClaimedGpu.claim["capability"])))
        validate_parsed_serve_args(args)
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER)
    except (Exception, SystemExit):  # noqa: BLE001 - it is the answer
        return {"error": traceback.format_exc()}
    try:
        return chosen(config) if build else {}
    except Exception:  # noqa: BLE001 - it is the answer
        return {"error": traceback.format_exc()}


def chosen(config: Any) -> dict[str, Any]:
    """Build the model, and the draft where there is one, without memory, and read from it what was chosen.

    As for one GPU: with several each has a part of the same layers.
    """
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config.parallel_config.tensor_parallel_size = config.parallel_config.world_size = 1
    models = []
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
            parallel_state.init_distributed_environment(1, 0, "env://", 0, "gloo")
        parallel_state.destroy_model_parallel()  # the last model's: only one with experts has a group for them
        parallel_state.initialize_model_parallel(1)
        with torch.device("meta"):
            models.append(initialize_model(config))
            if config.speculative_config:
                models.append(initialize_model(config, model_config=config.speculative_config.draft_model_config))
        cache = kv_cache(config)
    found: dict[str, set[str]] = {"attention": set(), "linear": set(), "moe": set()}
    for model in models:
        for module in model.modules():
            note(module, found)
    return {kind: sorted(names) for kind, names in found.items() if names} | {"kv_cache": cache}


def kv_cache(config: Any) -> dict[str, int]:
    """Have vLLM plan the KV cache of the layers that were built, and return what it takes of 40 GB."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
    from vllm.v1.core import kv_cache_utils

    ClaimedGpu().update_block_size_for_backend(config)
    layers = get_layers_from_vllm_config(config, AttentionLayerBase)
    specs = {name: spec for name, layer in layers.items() if (spec := layer.get_kv_cache_spec(config))}
    layouts = get_supported_kv_cache_layouts({layers[name].get_attn_backend() for name in specs})
    resolve_kv_cache_layout(config, [[layout.name for layout in layouts]], specs.values())
    planned = kv_cache_utils.get_kv_cache_configs(config, [specs], [40 * 10**9])
    cache = kv_cache_utils.generate_scheduler_kv_cache_config(planned)
    return {
        "tokens": kv_cache_utils.get_kv_cache_capacity(config, cache)[0],
        "request_bytes": kv_cache_utils._max_memory_usage_bytes_from_groups(config, cache.kv_cache_groups),
        "max_model_len": config.model_config.max_model_len,
    }


def note(module: torch.nn.Module, found: dict[str, set[str]]) -> None:
    """Add what one layer computes with."""
    kind = type(module).__name__
    if backend := getattr(module, "attn_backend", None):
        found["attention"].add(f"{kind}: {getattr(backend, 'name', None) or backend.get_name()}")
    method = getattr(module, "quant_method", None)
    if method is None or "KVCache" in type(method).__name__:
        return
    parts = [type(method).__name__]
    for owner in (method, module, getattr(module, "scheme", None)):
        for name, value in vars(owner).items() if owner else ():
            if isinstance(value, enum.Enum) and "backend" in name:
                parts.append(value.name)
            elif type(value).__module__.startswith("vllm.model_executor.kernels"):
                parts.append(type(value).__name__)
    found["moe" if "MoE" in parts[0] else "linear"].add(" ".join(dict.fromkeys(parts)))


if __name__ == "__main__":
    main()
