"""From a registry entry to the engine's command line and environment. Pure: reads no environment, touches no file.

Flags stand in named groups, each with its reason. A test parses every entry's flags with the pinned engine's parser.
Neither argv nor environment ever holds a key or a token: they reach the engine through its control pipe.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from service.models import DEFAULT_ALIAS, ModelSpec

IN_ENGINE = Path(__file__).parent / "in_engine"
PLUGIN = "vllm_service"  # the name of the entry points in in_engine/*.dist-info
ENTRY = f"{PLUGIN}.main"
SHUTDOWN_TIMEOUT_S = 20

# What of the parent's environment the engine has no business with: secrets, and settings that are not the engine's.
_WITHHELD_PREFIXES = ("SERVICE_", "MODAL_", "API_KEY", "VLLM_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "PYTHON")

# A CPU replica is one person's laptop: small batches and a small cache start faster and leave memory alone.
_CPU_MAX_MODEL_LEN = 8192
_CPU_KV_CACHE_BYTES = 2 * 1024**3
_CPU_TINY_KV_CACHE_BYTES = 64 * 1024**2
_TINY_GB = 0.1


@dataclass(frozen=True)
class EngineCommand:
    """How to start the engine: `python -m vllm_service.main <argv>` with exactly this environment."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    host: str
    port: int


def engine_command(
    spec: ModelSpec,
    weights: Path,
    *,
    draft: Path | None = None,
    default_key: str | None = None,
    device: str = "cuda",
    n_gpu: int = 1,
    fast_boot: bool = True,
    host: str = "127.0.0.1",
    port: int = 8000,
    shutdown_timeout_s: int = SHUTDOWN_TIMEOUT_S,
    parent_env: Mapping[str, str] | None = None,
) -> EngineCommand:
    """Return the command that serves `spec` from the directory `weights`.

    Args:
        spec: The registry entry.
        weights: Directory with config, tokenizer and safetensors; never a hub id, so the engine asks no hub.
        draft: Directory of the draft model, for entries with `speculative`.
        default_key: Key of the default model; the entry of that key also answers to `llm`.
        device: `cuda` or `cpu`.
        n_gpu: GPUs to spread the model over.
        fast_boot: Skip compilation and CUDA graphs.
        host: Address to listen on.
        port: Port to listen on.
        shutdown_timeout_s: How long streams in flight may go on after SIGTERM.
        parent_env: The environment to pass on, less secrets and settings.
    """
    argv = [
        *_identity(spec, weights, default_key),
        *_door(host, port, shutdown_timeout_s),
        *_execution(spec, device, n_gpu, fast_boot),
        *_parsers(spec),
        *_limits(spec, device),
        *_acceleration(spec, draft, device),
        *spec.extra_args,
    ]
    return EngineCommand(tuple(argv), _environment(parent_env or {}, device), host, port)


def _identity(spec: ModelSpec, weights: Path, default_key: str | None) -> list[str]:
    names = dict.fromkeys(spec.names)  # the first is the one that responses carry
    if spec.key == default_key:
        names[DEFAULT_ALIAS] = None
    return ["--model", str(weights), "--served-model-name", *names]


def _door(host: str, port: int, shutdown_timeout_s: int) -> list[str]:
    """Where it listens, and our guard as the outermost layer: vLLM's own key leaves many routes open."""
    return [
        *("--host", host, "--port", str(port)),
        *("--middleware", f"{PLUGIN}.guard.Guard"),
        *("--shutdown-timeout", str(shutdown_timeout_s)),  # without it SIGTERM hung in 3 of 6 runs with streams
        *("--disable-access-log-for-endpoints", "/health,/metrics"),
    ]


def _execution(spec: ModelSpec, device: str, n_gpu: int, fast_boot: bool) -> list[str]:
    flags = ["--enforce-eager" if fast_boot else "--no-enforce-eager"]
    if device == "cpu":
        flags += ["--distributed-executor-backend", "uni"]  # with the variable below: no worker process
    elif n_gpu > 1:
        flags += ["--tensor-parallel-size", str(n_gpu)]
    if spec.async_scheduling is not None:
        flags.append("--async-scheduling" if spec.async_scheduling else "--no-async-scheduling")
    return flags


def _parsers(spec: ModelSpec) -> list[str]:
    flags: list[str] = []
    if spec.tool_call_parser:
        flags += ["--enable-auto-tool-choice", "--tool-call-parser", spec.tool_call_parser]
        flags += ["--tool-strict-level", "parameter"]  # a forced call's arguments fit their schema, strict or not
        flags += ["--exclude-tools-when-tool-choice-none"]  # else the model sees them, and calls them all the same
    if spec.reasoning_parser:
        flags += ["--reasoning-parser", spec.reasoning_parser]
    if spec.chat_template:
        flags += ["--chat-template", str(Path(__file__).parent / spec.chat_template)]
    # A schema alone lets a model write white space for ever, so none is free. "auto" refuses that switch, and
    # "guidance" cannot read the grammars of forced and strict tool calls in vLLM 0.32 (400 'triggers').
    flags += ["--structured-outputs-config", _json({"backend": "xgrammar", "disable_any_whitespace": True})]
    return flags


def _limits(spec: ModelSpec, device: str) -> list[str]:
    flags: list[str] = []
    if device == "cpu":
        tiny = spec.weights_gb is not None and spec.weights_gb < _TINY_GB
        # -1: as long as the model allows and the cache holds
        flags += ["--max-model-len", str(min(spec.max_model_len, _CPU_MAX_MODEL_LEN) if spec.max_model_len else -1)]
        flags += ["--kv-cache-memory-bytes", str(_CPU_TINY_KV_CACHE_BYTES if tiny else _CPU_KV_CACHE_BYTES)]
        flags += ["--max-num-seqs", "16", "--max-num-batched-tokens", "2048"]
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
    return flags


def _environment(parent_env: Mapping[str, str], device: str) -> dict[str, str]:
    env = {name: value for name, value in parent_env.items() if not name.startswith(_WITHHELD_PREFIXES)}
    env |= {
        "PYTHONPATH": str(IN_ENGINE),
        "PYTHONUNBUFFERED": "1",
        "VLLM_PLUGINS": PLUGIN,  # and no other plugin that happens to be installed
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_COLOR": "0",
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        "HF_HUB_OFFLINE": "1",  # the weights are here: an outage of the hub cannot stop a boot
        "TRANSFORMERS_OFFLINE": "1",
    }
    if device == "cpu":
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return env


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
