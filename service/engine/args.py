"""From a registry entry to the engine's command line and environment. Pure: reads no environment, touches no file.

Flags stand in named groups, each with its reason. A test parses every entry's flags with the pinned engine's parser.
Neither argv nor environment ever holds a key or a token: they reach the engine through its control pipe.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from service.engine import cpu
from service.engine.inherited import inherited
from service.engine.model_files import ModelFiles
from service.engine.parsers import with_parsers
from service.engine.shutdown import MODAL_SHUTDOWN, ShutdownBudget
from service.in_engine.vllm_service import gpu_flags
from service.in_engine.vllm_service.form_data import FILE_LIMIT
from service.in_engine.vllm_service.http_contract import IMAGE_PIXELS, MIB
from service.registry.models import DEFAULT_ALIAS, ModelSpec

IN_ENGINE = Path(__file__).parents[1] / "in_engine"
PLUGIN = "vllm_service"  # the name of the entry points in in_engine/*.dist-info
ENTRY = f"{PLUGIN}.main"

KEEP_ALIVE_S = 75  # an idle connection to the engine; vLLM's 5 s are shorter than those of clients and balancers
SPECULATIVE_BATCHED_TOKENS = 8192  # vLLM warns that fewer are slow; its own default is 2048 below an H100
_ADAPTERS_AT_ONCE = 4  # in one batch: GPU memory is reserved for so many; requests for more wait


@dataclass(frozen=True)
class EngineCommand:
    """How to start the engine: `python -m vllm_service.main <argv>` with exactly this environment."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    host: str
    port: int


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What settings and the place of the run decide about an engine, whatever its model.

    A setting of the same name fills a field (`Plan.from_settings`). A new one needs a line here, and its flag below.

    Attributes:
        n_gpu: GPUs to spread the model over.
        fast_boot: Skip compilation and CUDA graphs.
        max_n: The most answers to one request.
        host: Address to listen on.
        port: Port to listen on.
        shutdown: How long each step of the end may take.
    """

    n_gpu: int = 1
    fast_boot: bool = True
    max_n: int = 16
    host: str = "127.0.0.1"
    port: int = 8000
    shutdown: ShutdownBudget = MODAL_SHUTDOWN


def engine_command(
    spec: ModelSpec,
    weights: Path,
    options: EngineOptions | None = None,
    *,
    files: ModelFiles | None = None,
    draft: Path | None = None,
    adapters: Mapping[str, Path] | None = None,
    default_key: str | None = None,
    device: str = "cuda",
    sleeps: bool = False,
    parent_env: Mapping[str, str] | None = None,
) -> EngineCommand:
    """Return the command that serves `spec` from the directory `weights`.

    Args:
        spec: The registry entry.
        weights: Directory with config, tokenizer and safetensors; never a hub id, so the engine asks no hub.
        options: What settings decide.
        files: What the files in `weights` say; None: nothing.
        draft: Directory of the draft model, for entries with `speculative`.
        adapters: Directory of each LoRA adapter by the name it is served under.
        default_key: Key of the default model; the entry of that key also answers to `llm`.
        device: `cuda` or `cpu`.
        sleeps: It will be in sleep mode, its weights in host memory, and woken from a GPU memory snapshot.
        parent_env: The parent's environment, of which `inherited` passes some variables on.
    """
    options = options or EngineOptions()
    if files:
        spec = with_parsers(spec, files)
    argv = [
        *_identity(spec, weights, default_key),
        *_listening(options),
        *_execution(spec, device, options),
        *_sleep(device, sleeps),
        *_parsers(spec),
        *_limits(spec, device, files),
        *_acceleration(spec, draft, device),
        *_adapters(spec, adapters or {}),
        *spec.extra_args,
    ]
    env = _environment(parent_env or {}, device, options, sleeps)
    if device == "cuda" and (bounds := _gpu_flags(spec)):
        env[gpu_flags.VARIABLE] = _json(bounds)
    if device == "cpu":
        env = cpu.openmp(spec, files) | env  # unless the user set them
    return EngineCommand(tuple(argv), env, options.host, options.port)


def _identity(spec: ModelSpec, weights: Path, default_key: str | None) -> list[str]:
    names = dict.fromkeys(spec.names)  # the first is the one that responses carry
    if spec.key == default_key:
        names[DEFAULT_ALIAS] = None
    return ["--model", str(weights), "--served-model-name", *names]


def _listening(options: EngineOptions) -> list[str]:
    """Where it listens, and our guard as the outermost layer: vLLM's own key leaves many routes open."""
    return [
        *("--host", options.host, "--port", str(options.port)),
        *("--middleware", f"{PLUGIN}.guard.Guard"),
        *("--shutdown-timeout", str(options.shutdown.vllm_s)),
        *("--disable-access-log-for-endpoints", "/health,/metrics"),
    ]


def _sleep(device: str, sleeps: bool) -> list[str]:
    """Return the worker extension, which every engine has, and what an engine that sleeps needs."""
    flags = ["--worker-extension-cls", f"{PLUGIN}.worker_extension.WorkerExtension"]
    if sleeps and device == "cuda":  # on CPU vLLM refuses the flag, and the scheduler sleeps without it
        # weights are read into the engine's own memory: a mapped file would be open in the snapshot
        flags += ["--enable-sleep-mode", "--safetensors-load-strategy", "eager"]
    return flags


def _execution(spec: ModelSpec, device: str, options: EngineOptions) -> list[str]:
    flags = ["--enforce-eager" if options.fast_boot else "--no-enforce-eager"]
    if spec.task in {"embed", "classify"} and "--runner" not in spec.extra_args:
        flags += ["--runner", "pooling"]
    if device == "cpu":
        flags += ["--distributed-executor-backend", "uni"]  # with the variable below: no worker process
    elif options.n_gpu > 1:
        flags += ["--tensor-parallel-size", str(options.n_gpu)]
    if spec.async_scheduling is not None:
        flags.append("--async-scheduling" if spec.async_scheduling else "--no-async-scheduling")
    return flags


def _parsers(spec: ModelSpec) -> list[str]:
    flags: list[str] = []
    if spec.tool_call_parser:
        flags += ["--enable-auto-tool-choice", "--tool-call-parser", spec.tool_call_parser]
        flags += ["--exclude-tools-when-tool-choice-none"]  # else the model sees them, and calls them all the same
    if spec.reasoning_parser:
        flags += ["--reasoning-parser", spec.reasoning_parser]
    if spec.chat_template:
        flags += ["--chat-template", str(spec.chat_template_file)]
    # `--structured-outputs-config` and `--tool-strict-level` stay at vLLM's `auto`. Backend "xgrammar" refuses a schema
    # with `multipleOf`, or with `pattern` beside `minLength`; level "parameter" refuses every request that offers one
    # tool which xgrammar cannot compile. vllm_service/structured_outputs.py says what else `auto` needs.
    return flags


def _limits(spec: ModelSpec, device: str, files: ModelFiles | None) -> list[str]:
    flags: list[str] = []
    if device == "cpu":
        # -1: as long as the model allows and the cache holds
        flags += ["--max-model-len", str(cpu.max_model_len(spec, files) or -1)]
        flags += ["--kv-cache-memory-bytes", str(cpu.kv_cache_bytes(spec, files))]
        flags += ["--max-num-seqs", str(cpu.MAX_NUM_SEQS), "--max-num-batched-tokens", str(cpu.MAX_BATCHED_TOKENS)]
    elif spec.max_model_len:
        flags += ["--max-model-len", str(spec.max_model_len)]
    if spec.limit_mm_per_prompt:
        flags += ["--limit-mm-per-prompt", _json(spec.limit_mm_per_prompt)]
    return flags


def _acceleration(spec: ModelSpec, draft: Path | None, device: str) -> list[str]:
    if device == "cpu":  # none of these has kernels there
        return []
    flags: list[str] = []
    if spec.kv_cache_dtype:
        flags += ["--kv-cache-dtype", spec.kv_cache_dtype]
    if spec.moe_backend:
        flags += ["--moe-backend", spec.moe_backend]
    for name in spec.fusion_passes:
        flags += [f"-cc.pass_config.{name}=true"]
    if spec.speculative:
        config: dict[str, object] = spec.speculative.model_dump(include={"method", "num_speculative_tokens"})
        if draft:
            config["model"] = str(draft)
        flags += ["--speculative-config", _json(config)]
        flags += ["--max-num-batched-tokens", str(SPECULATIVE_BATCHED_TOKENS)]
    return flags


def _gpu_flags(spec: ModelSpec) -> dict[str, object]:
    """Return for which GPUs the flags are that were chosen for the entry's own.

    Older ones lack what it has; a newer generation has other MoE kernels.
    """
    major, minor = spec.tier.gpu.compute_capability
    bounds: dict[str, object] = {}
    if spec.kv_cache_dtype:
        bounds["--kv-cache-dtype"] = [[major, minor], [99, 0]]
    if spec.moe_backend:
        bounds["--moe-backend"] = [[major, minor], [major + 1, 0]]
    return bounds


def _adapters(spec: ModelSpec, adapters: Mapping[str, Path]) -> list[str]:
    """Return the LoRA adapters, each a model with a name of its own, and room for those that come while it serves.

    All are kept in memory: one that vLLM reads again in the middle of a batch ends the engine if its file has gone.
    """
    if not (room := spec.adapter_room):
        return []
    limits = ["--max-lora-rank", str(spec.max_lora_rank), "--max-loras", str(min(room, _ADAPTERS_AT_ONCE))]
    limits += ["--max-cpu-loras", str(room)]
    modules = [_json({"name": name, "path": str(path), "base_model_name": spec.key}) for name, path in adapters.items()]
    return ["--enable-lora", *limits, *(["--lora-modules", *modules] if modules else [])]


def _environment(parent_env: Mapping[str, str], device: str, options: EngineOptions, sleeps: bool) -> dict[str, str]:
    env = inherited(parent_env) | {
        "PYTHONPATH": str(IN_ENGINE),
        "PYTHONSAFEPATH": "1",  # else `python -m` imports what lies in the working directory
        "PYTHONUNBUFFERED": "1",
        "VLLM_PLUGINS": PLUGIN,  # and no other plugin that may be installed
        "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",  # a pickle that is read all the same gives numbers, and runs no code
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_COLOR": "0",
        "VLLM_XGRAMMAR_CACHE_MB": "256",  # of compiled structured outputs; vLLM keeps 512
        "VLLM_MEDIA_CONNECTOR": PLUGIN,  # fetches from listed hosts alone; vLLM's own fetches from anywhere
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        "VLLM_MAX_IMAGE_PIXELS": str(IMAGE_PIXELS),  # of listed hosts and videos; the guard looks at data in URLs
        "VLLM_MAX_AUDIO_CLIP_FILESIZE_MB": str(FILE_LIMIT // MIB),  # of listed hosts too; the guard looks at forms
        "VLLM_MAX_N_SEQUENCES": str(options.max_n),
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_S),
        # vLLM's value, set here because torch is imported before vLLM; with more, torch starts processes
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "HF_HUB_OFFLINE": "1",  # the weights are local: an outage of the hub must not stop a boot
        "TRANSFORMERS_OFFLINE": "1",
    }
    if device == "cpu":
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if options.fast_boot:  # else logprobs compile C++: 17 s at first, and without a compiler the engine ends
            env["TORCHDYNAMO_DISABLE"] = "1"
    else:  # vLLM's value, set here because torch is imported first: the GPU check must not prevent a fork
        env["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    if sleeps:  # no NCCL shared memory and no address of this network in a snapshot. Source: llm-d's own script
        env |= {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "VLLM_HOST_IP": "127.0.0.1"}
    return env


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
