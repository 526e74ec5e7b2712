"""The allow-list of variables that an engine inherits."""

from __future__ import annotations

import pytest

from service.engine.inherited import inherited

SECRETS = [
    *("API_KEY", "API_KEYS", "API_LIMITS", "OPENAI_API_KEY", "ANTHROPIC_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
    *(
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "MODAL_TOKEN_ID",
        "MODAL_TOKEN_SECRET",
        "MODAL_KEY",
        "MODAL_SECRET",
    ),
    *("GITHUB_TOKEN", "DATABASE_URL", "WANDB_API_KEY", "NVIDIA_API_KEY", "VLLM_API_KEY", "S3_SECRET_ACCESS_KEY"),
    *("TRITON_API_KEY", "TORCH_HUB_TOKEN", "CUDA_REGISTRY_PASSWORD", "HTTPS_PROXY", "https_proxy", "ALL_PROXY"),
]
KUBERNETES = [
    f"{service}_{name}"
    for service in ("VLLM", "VLLM_CPU", "TRITON", "NCCL", "SERVICE")
    for name in (
        *("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_8000_TCP", "PORT_8000_TCP_ADDR"),
        *("PORT_8000_TCP_PORT", "PORT_8000_TCP_PROTO"),
    )
]
OPENING = [
    *("VLLM_SERVER_DEV_MODE", "VLLM_PLUGINS", "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_ALLOW_INSECURE_SERIALIZATION"),
    *("VLLM_USE_RUST_FRONTEND", "VLLM_USE_MODELSCOPE", "VLLM_MEDIA_URL_ALLOW_REDIRECTS", "VLLM_MAX_N_SEQUENCES"),
    *("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "VLLM_MEDIA_CONNECTOR", "VLLM_LORA_RESOLVER_CACHE_DIR", "VLLM_MEDIA_CACHE"),
    *("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "SERVICE_PORT", "MODAL_TASK_ID", "HF_HUB_OFFLINE", "HF_ENDPOINT"),
]
NEEDED = [
    *("PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "TMPDIR", "XDG_CACHE_HOME", "HF_HOME", "LD_LIBRARY_PATH"),
    *("LD_PRELOAD", "CXX", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "NVIDIA_VISIBLE_DEVICES", "NCCL_SOCKET_IFNAME"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTORCH_ALLOC_CONF", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"),
    *("VLLM_LOGGING_LEVEL", "VLLM_CACHE_ROOT", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE"),
]


@pytest.mark.parametrize("name", [*SECRETS, *KUBERNETES, *OPENING, "", "SOMETHING_NEW"])
def test_inherited_leaves_out_secrets_platforms_and_what_opens_the_engine(name: str) -> None:
    """Whatever is not on the list stays with the parent."""
    assert inherited({name: "x"}) == {}


@pytest.mark.parametrize("name", NEEDED)
def test_inherited_passes_on_what_tunes_the_engine(name: str) -> None:
    """Paths, language, GPUs, threads, kernels and vLLM's own, each with its value."""
    assert inherited({name: "x", "API_KEY": "y"}) == {name: "x"}
