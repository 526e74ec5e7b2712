"""How much context, memory and threads an engine without a GPU gets: few by default, since it usually runs on a laptop.

An entry's `cpu_max_model_len` decides the context; then the KV cache is made large enough for one request of that
length, or the model is refused where that does not fit.
"""

from __future__ import annotations

import os

from service import memory
from service.engine.kv_cache import KVCache
from service.engine.model_files import ModelFiles
from service.errors import ContextMemoryError
from service.registry.models import ModelSpec

MAX_MODEL_LEN = 8192  # by default: a longer one would keep memory that most requests never use
MAX_NUM_SEQS = 18  # 16 of one client, see client_shares.py
_KV_CACHE_BYTES = 2 * 1024**3  # at most, but for one request of the whole context
# Of as many sequences. A larger cache is made and kept for nothing: 2 GiB take 1 to 3 s of a boot.
_TOKENS_EACH = 2048
_TINY_KV_CACHE_BYTES = 64 * 1024**2
_TINY_BYTES = 0.1e9
_UNKNOWN_BYTES = 2e9  # of weights whose size nobody knows: a small model's
_ENGINE_BYTES = 2 * 1024**3  # vLLM and torch themselves: 1.1 GB idle, measured, and what a request takes
_BLOCK = 128  # tokens; the KV cache consists of whole blocks
MAX_BATCHED_TOKENS = 2048  # of one step


def max_model_len(spec: ModelSpec, files: ModelFiles | None = None) -> int | None:
    """Return the context of an engine without a GPU; None: neither the entry nor the model's files say."""
    if spec.cpu_max_model_len:
        return spec.cpu_max_model_len
    own = spec.max_model_len or (files and files.max_model_len)
    return min(own, MAX_MODEL_LEN) if own else None


def kv_cache_bytes(spec: ModelSpec, files: ModelFiles | None = None) -> int:
    """Return the size of the KV cache: enough for one request of the whole context, and for many shorter ones."""
    usual = _TINY_KV_CACHE_BYTES if _weights_bytes(spec, files) < _TINY_BYTES else _KV_CACHE_BYTES
    length, cache = max_model_len(spec, files), files and _kv_cache(files)
    if not (length and cache):
        return usual
    if many := MAX_NUM_SEQS * cache.request_bytes(_TOKENS_EACH):
        usual = min(usual, many)
    return max(usual, cache.request_bytes(length) + 2 * cache.block_bytes)


def memory_bytes(spec: ModelSpec, files: ModelFiles | None = None) -> int:
    """Return how much memory an engine without a GPU takes."""
    return int(_weights_bytes(spec, files)) + kv_cache_bytes(spec, files) + _ENGINE_BYTES


def openmp(spec: ModelSpec, files: ModelFiles | None = None) -> dict[str, str]:
    """Return an environment in which the engine's OpenMP threads leave a core to what is beside them.

    A step of a model is hundreds of short parallel loops, each as slow as its last thread. Where as many threads as
    cores compute and anything else runs, one of them always waits for a core: one stream of SmolLM2-135M on two cores
    fell from 64 tokens/s to 8 beside one busy process; with a thread fewer it is 59 and 54. vLLM keeps a core free for
    its API server in its own executor only, which these engines do not have. Of a tiny model one thread is enough.
    Tried: all cores for steps of four tokens and more. Eight streams got 139 tokens/s instead of 112, and beside one
    busy process 36 instead of 105; a thread fewer while threads wait for a core got 109, as some always do.

    A thread of libgomp that waits spins for 300,000 turns, also while the other has no processor. 10,000 are as quick
    on idle cores (64 tokens/s; 42 where they sleep at once).
    """
    if _weights_bytes(spec, files) < _TINY_BYTES:
        return {"OMP_NUM_THREADS": "1"}
    return {"OMP_NUM_THREADS": str(max(_cores() - 1, 1)), "GOMP_SPINCOUNT": "10000"}


def check_context(spec: ModelSpec, files: ModelFiles) -> None:
    """Refuse a context of an entry's own whose KV cache does not fit beside the weights.

    Raises:
        ContextMemoryError: It needs more memory than may be used.
    """
    cache = _kv_cache(files)
    if not (spec.cpu_max_model_len and cache):
        return
    needed = memory_bytes(spec, files)
    if lack := memory.shortage(needed):
        beside = int(_weights_bytes(spec, files)) + _ENGINE_BYTES
        free = lack.usable_bytes - beside - cache.block_bytes
        fitting = cache.longest(free, spec.cpu_max_model_len) // _BLOCK * _BLOCK
        raise ContextMemoryError(
            f"A context of {spec.cpu_max_model_len} tokens of model '{spec.key}' needs {needed / 1e9:.1f} GB without a "
            f"GPU: {kv_cache_bytes(spec, files) / 1e9:.1f} GB of KV cache, {_weights_bytes(spec, files) / 1e9:.1f} GB "
            f"of weights and {_ENGINE_BYTES / 1e9:.1f} GB for the engine; {lack}.",
            hint=f"Set max_model_len (or cpu_max_model_len) of its entry to {fitting} or less, or free memory."
            if fitting >= MAX_MODEL_LEN
            else "Remove max_model_len (and cpu_max_model_len) from its entry, free memory, or serve a smaller model.",
        )


def _kv_cache(files: ModelFiles) -> KVCache | None:
    return files.kv_cache(MAX_BATCHED_TOKENS, _BLOCK)


def _weights_bytes(spec: ModelSpec, files: ModelFiles | None) -> float:
    return (files and files.weights_bytes) or (spec.weights_gb or 0) * 1e9 or _UNKNOWN_BYTES


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    return len(affinity(0)) if affinity else os.cpu_count() or 1
