"""Which variables an engine inherits. Pure.

An allow-list, so that no key or token of the user's shell reaches the engine, whatever it is called, and no platform's
variable configures it: Kubernetes gives each pod `VLLM_PORT=tcp://…` for a Service named `vllm`, on which vLLM ends.
Proxies are left out because their URLs may hold passwords; the engine reads weights from this machine alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

NAMES = frozenset(
    (
        *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"),
        # shared libraries, compilers of JIT kernels, certificates
        *("LD_LIBRARY_PATH", "LD_PRELOAD", "CC", "CXX", "CPATH", "LIBRARY_PATH", "MAX_JOBS"),
        *("NVCC_THREADS", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "SSL_CERT_FILE", "SSL_CERT_DIR"),
        # which GPUs a container shows
        *("NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES", "NVIDIA_TF32_OVERRIDE"),
        *("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_MODULES_CACHE"),
        *("TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS", "SAFETENSORS_FAST_GPU"),
        # vLLM's own: directories, logs, timeouts, and how it computes. None that opens a route, loads code or models,
        # or passes the guard by, such as VLLM_SERVER_DEV_MODE, VLLM_PLUGINS and VLLM_USE_RUST_FRONTEND.
        *("VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "VLLM_TUNED_CONFIG_FOLDER", "VLLM_LOGGING_LEVEL"),
        *("VLLM_LOG_STATS_INTERVAL", "VLLM_ENGINE_READY_TIMEOUT_S", "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"),
        *("VLLM_IMAGE_FETCH_TIMEOUT", "VLLM_VIDEO_FETCH_TIMEOUT", "VLLM_AUDIO_FETCH_TIMEOUT"),
        *("VLLM_WORKER_MULTIPROC_METHOD", "VLLM_BATCH_INVARIANT", "VLLM_FLOAT32_MATMUL_PRECISION"),
        *("VLLM_KV_CACHE_LAYOUT", "VLLM_SKIP_P2P_CHECK", "VLLM_MLA_DISABLE", "VLLM_DISABLED_KERNELS"),
        *("VLLM_USE_FLASHINFER_SAMPLER", "VLLM_USE_FLASHINFER_MOE_INT4", "VLLM_USE_TRITON_AWQ", "VLLM_USE_AOT_COMPILE"),
        *("VLLM_USE_STANDALONE_COMPILE", "VLLM_USE_NCCL_SYMM_MEM", "VLLM_USE_V2_MODEL_RUNNER"),
        *("VLLM_DISABLE_COMPILE_CACHE", "VLLM_ENABLE_CUDA_COMPATIBILITY", "VLLM_CUDA_COMPATIBILITY_PATH"),
        *("VLLM_CUDART_SO_PATH", "VLLM_WSL2_ENABLE_PIN_MEMORY"),
    )
)
PREFIXES = (
    *("LC_", "CUDA_", "CUBLAS_", "CUDNN_", "NCCL_", "GLOO_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "MALLOC_"),
    *("PYTORCH_", "TORCH_", "TORCHDYNAMO_", "TORCHINDUCTOR_", "TRITON_", "FLASHINFER_", "DG_"),  # DG_: DeepGEMM
    *("VLLM_ALLREDUCE_", "VLLM_CPU_", "VLLM_DEEP_GEMM_", "VLLM_ENABLE_INDUCTOR_", "VLLM_FLASHINFER_", "VLLM_MARLIN_"),
    *("VLLM_MOE_", "VLLM_NCCL_", "VLLM_ROCM_", "VLLM_TRITON_", "VLLM_USE_DEEP_GEMM", "VLLM_WEIGHT_OFFLOADING_"),
)
# Within those prefixes: what Kubernetes sets for a Service named `triton`, what reads like a secret, and
# TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD, with which pickles run code.
_WITHHELD = re.compile(r"_(?:SERVICE_HOST|SERVICE_PORT|PORT)(?:_|$)|(?:KEY|TOKEN|SECRET|PASSWORD)$|WEIGHTS_ONLY_LOAD$")


def inherited(parent_env: Mapping[str, str]) -> dict[str, str]:
    """Return those of the parent's variables that an engine inherits."""
    return {name: value for name, value in parent_env.items() if _is_inherited(name)}


def _is_inherited(name: str) -> bool:
    return name in NAMES or (name.startswith(PREFIXES) and not _WITHHELD.search(name))
