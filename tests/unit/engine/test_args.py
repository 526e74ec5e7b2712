"""The engine's command line and environment, whole, for each kind of entry."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from service.engine.args import IN_ENGINE, EngineCommand, EngineOptions, engine_command
from service.registry.models import ModelSpec, Registry

SPECS = Registry.load().specs
WEIGHTS = Path("/weights")
SECRETS = {
    "HF_TOKEN": "s3cret-hub",
    "HUGGING_FACE_HUB_TOKEN": "s3cret-hub-old",
    "API_KEY": "s3cret-key",
    "API_KEYS": "alice=s3cret-alice",
    "VLLM_API_KEY": "s3cret-vllm",
    "MODAL_TOKEN_ID": "s3cret-id",
    "MODAL_TOKEN_SECRET": "s3cret-modal",
    "MODAL_KEY": "s3cret-proxy",
    "MODAL_SECRET": "s3cret-proxy-too",
}
SERVER_FLAGS = (
    *("--host", "127.0.0.1", "--port", "8000"),
    *("--middleware", "vllm_service.guard.Guard"),
    *("--shutdown-timeout", "1"),
    *("--disable-access-log-for-endpoints", "/health,/metrics"),
)
WORKER = ("--worker-extension-cls", "vllm_service.worker_extension.WorkerExtension")


def command(key: str, options: EngineOptions | None = None, **more: object) -> EngineCommand:
    """Return the command for a registry entry."""
    return engine_command(SPECS[key], WEIGHTS, options, **more)  # type: ignore[arg-type]


def value(argv: tuple[str, ...], flag: str) -> str:
    """Return what stands behind a flag."""
    return argv[argv.index(flag) + 1]


def test_argv_of_a_text_model_on_cuda_is_this() -> None:
    """Parsers and context from the entry, one GPU, no compilation."""
    assert command("qwen3-8b", default_key="qwen3-8b").argv == (
        *("--model", "/weights", "--served-model-name", "qwen3-8b", "Qwen/Qwen3-8B-FP8", "llm"),
        *SERVER_FLAGS,
        "--enforce-eager",
        *WORKER,
        *(
            "--enable-auto-tool-choice",
            "--tool-call-parser",
            "hermes",
            "--exclude-tools-when-tool-choice-none",
            "--reasoning-parser",
            "qwen3",
        ),
        *("--max-model-len", "40960"),
    )


def test_argv_of_a_model_with_images_limits_them() -> None:
    """Without a limit one request may bring any number of images."""
    assert command("qwen3-vl-30b").argv == (
        *("--model", "/weights", "--served-model-name", "qwen3-vl-30b", "Qwen/Qwen3-VL-30B-A3B-Instruct"),
        *SERVER_FLAGS,
        "--enforce-eager",
        *WORKER,
        *(
            "--enable-auto-tool-choice",
            "--tool-call-parser",
            "hermes",
            "--exclude-tools-when-tool-choice-none",
        ),
        *("--max-model-len", "32768", "--limit-mm-per-prompt", '{"image":4,"video":1}'),
    )


def test_argv_of_gpt_oss_has_every_acceleration() -> None:
    """EAGLE3 from a directory, FP8 KV cache, FlashInfer's MoE, asynchronous scheduling, fusion passes, compiled."""
    speculative = '{"method":"eagle3","num_speculative_tokens":7,"model":"/draft"}'
    assert command("gpt-oss-120b", EngineOptions(fast_boot=False), draft=Path("/draft")).argv == (
        *("--model", "/weights", "--served-model-name", "gpt-oss-120b", "openai/gpt-oss-120b"),
        *SERVER_FLAGS,
        *("--no-enforce-eager", "--async-scheduling"),
        *WORKER,
        *(
            "--enable-auto-tool-choice",
            "--tool-call-parser",
            "openai",
            "--exclude-tools-when-tool-choice-none",
            "--reasoning-parser",
            "openai_gptoss",
        ),
        *("--max-model-len", "32768", "--kv-cache-dtype", "fp8", "--moe-backend", "flashinfer_cutlass"),
        *("-cc.pass_config.fuse_allreduce_rms=true", "-cc.pass_config.eliminate_noops=true"),
        *("--speculative-config", speculative, "--max-num-batched-tokens", "8192"),
    )


def test_env_of_gpt_oss_says_for_which_gpus_its_flags_are() -> None:
    """Chosen for an H100: the engine leaves them out on an older GPU, and MoE kernels on a newer one."""
    bounds = json.loads(command("gpt-oss-20b").env["ENGINE_GPU_FLAGS"])

    assert bounds == {"--kv-cache-dtype": [[9, 0], [99, 0]], "--moe-backend": [[9, 0], [10, 0]]}
    assert "ENGINE_GPU_FLAGS" not in command("gpt-oss-20b", device="cpu").env
    assert "ENGINE_GPU_FLAGS" not in command("qwen3-8b").env


def test_argv_of_a_model_over_two_gpus_splits_its_tensors() -> None:
    """The count comes from the caller, who has compared it with what is visible."""
    argv = command("qwen3-235b", EngineOptions(n_gpu=2)).argv

    assert value(argv, "--tensor-parallel-size") == "2"


def test_argv_of_the_tiny_model_on_cpu_is_this() -> None:
    """One process, small batches, and a cache of 64 MiB."""
    assert command("tiny", device="cpu", default_key="tiny").argv == (
        *("--model", "/weights", "--served-model-name", "tiny", "llm"),
        *SERVER_FLAGS,
        *("--enforce-eager", "--distributed-executor-backend", "uni"),
        *WORKER,
        *(
            "--enable-auto-tool-choice",
            "--tool-call-parser",
            "hermes",
            "--exclude-tools-when-tool-choice-none",
            "--reasoning-parser",
            "qwen3",
        ),
        *("--max-model-len", "2048", "--kv-cache-memory-bytes", str(64 * 1024**2)),
        *("--max-num-seqs", "18", "--max-num-batched-tokens", "2048"),
    )


def test_argv_on_cpu_shortens_a_long_context() -> None:
    """A laptop's cache holds no 40960 tokens of many requests."""
    argv = command("qwen3-0.6b", device="cpu").argv

    assert value(argv, "--max-model-len") == "8192"
    assert value(argv, "--kv-cache-memory-bytes") == str(2 * 1024**3)


def test_argv_on_cpu_leaves_out_what_has_no_kernel_there() -> None:
    """No FP8 cache, MoE backend, fusion or speculation; the model is the same."""
    argv = " ".join(command("gpt-oss-20b", device="cpu", draft=Path("/draft")).argv)

    for flag in ("--kv-cache-dtype", "--moe-backend", "-cc.", "--speculative-config", "--tensor-parallel-size"):
        assert flag not in argv


def test_argv_of_an_entry_with_nothing_but_a_source_leaves_the_rest_to_vllm() -> None:
    """No parser, no length, no template: vLLM's own defaults."""
    spec = ModelSpec(key="mine", hub_id="org/mine")

    assert engine_command(spec, WEIGHTS).argv == (
        *("--model", "/weights", "--served-model-name", "mine", "org/mine"),
        *SERVER_FLAGS,
        "--enforce-eager",
        *WORKER,
    )
    assert value(engine_command(spec, WEIGHTS, device="cpu").argv, "--max-model-len") == "-1"


def test_argv_of_an_entry_with_a_chat_template_names_its_file() -> None:
    """Relative to this package, as `path` is."""
    spec = ModelSpec(key="mine", hub_id="org/mine", chat_template="assets/x.jinja")
    template = Path(value(engine_command(spec, WEIGHTS).argv, "--chat-template"))

    assert template.is_absolute()
    assert template.parts[-3:] == ("service", "assets", "x.jinja")


def test_argv_of_an_embedding_model_says_so_once() -> None:
    """The entry's task, or its own arguments."""
    spec = ModelSpec(key="vectors", hub_id="me/vectors", task="embed")
    own = spec.model_copy(update={"extra_args": ("--runner", "pooling")})

    for entry in (spec, own):
        argv = engine_command(entry, Path("/weights")).argv
        assert argv.count("--runner") == 1
        assert argv[argv.index("--runner") + 1] == "pooling"
    assert "--runner" not in engine_command(spec.model_copy(update={"task": "generate"}), Path("/weights")).argv


def test_engine_takes_as_many_answers_to_a_request_as_the_gateway() -> None:
    """VLLM's own bound is 16384."""
    spec = ModelSpec(key="mine", hub_id="me/mine")

    assert engine_command(spec, Path("/weights")).env["VLLM_MAX_N_SEQUENCES"] == "16"
    options = EngineOptions(max_n=200)
    assert engine_command(spec, Path("/weights"), options).env["VLLM_MAX_N_SEQUENCES"] == "200"


def test_argv_ends_with_the_extra_arguments() -> None:
    """Of two equal flags argparse takes the last: the user's own word counts."""
    spec = ModelSpec(key="mine", hub_id="org/mine", extra_args=("--seed", "1"))

    assert engine_command(spec, WEIGHTS).argv[-2:] == ("--seed", "1")


def test_argv_of_an_entry_with_aliases_serves_each_name_once() -> None:
    """Clients may use any; responses carry the key."""
    spec = ModelSpec(key="mine", hub_id="org/mine", aliases=("a", "b"))
    argv = engine_command(spec, WEIGHTS, default_key="mine").argv

    assert argv[argv.index("--served-model-name") + 1 : argv.index("--host")] == ("mine", "org/mine", "a", "b", "llm")


def test_argv_of_another_than_the_default_model_does_not_answer_to_llm() -> None:
    """`llm` is one model."""
    assert "llm" not in command("qwen3-4b", default_key="qwen3-8b").argv


@pytest.mark.parametrize("wanted", [True, False])
def test_argv_says_async_scheduling_both_ways(wanted: bool) -> None:
    """Unset leaves it to vLLM; set is said aloud."""
    argv = engine_command(ModelSpec(key="m", hub_id="a/b", async_scheduling=wanted), WEIGHTS).argv

    assert ("--async-scheduling" in argv, "--no-async-scheduling" in argv) == (wanted, not wanted)


def test_argv_of_a_draft_without_a_repository_names_no_model() -> None:
    """An MTP head is part of the model itself."""
    fields = {"method": "mtp", "num_speculative_tokens": 3}
    spec = ModelSpec.model_validate({"key": "m", "hub_id": "a/b", "speculative": fields})

    assert json.loads(value(engine_command(spec, WEIGHTS).argv, "--speculative-config")) == fields


def test_command_carries_host_and_port() -> None:
    """The supervisor polls the host and port that the engine's command has."""
    made = command("tiny", EngineOptions(host="0.0.0.0", port=9))

    assert (made.host, made.port) == ("0.0.0.0", 9)
    assert [value(made.argv, flag) for flag in ("--host", "--port")] == ["0.0.0.0", "9"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_command_lets_vllm_wait_for_no_request_at_the_end(device: str) -> None:
    """The drain has waited already when SIGTERM comes; vLLM would cut what is left without a word."""
    assert value(command("tiny", device=device).argv, "--shutdown-timeout") == "1"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("key", sorted(SPECS))
def test_command_holds_no_secret(key: str, device: str) -> None:
    """Nothing of the parent's secrets is in argv or environment, under any name."""
    made = command(key, device=device, parent_env={**SECRETS, "PATH": "/bin"})

    assert "s3cret" not in " ".join(made.argv) + str(dict(made.env))
    assert not set(SECRETS) & set(made.env)


def test_env_is_the_inherited_variables_and_the_engines_own() -> None:
    """What the allow-list passes on, and PYTHONPATH for our modules in place of the parent's."""
    parent = {"HOME": "/h", "CUDA_VISIBLE_DEVICES": "1", "SERVICE_PORT": "1", "PYTHONPATH": "/mine", "PYTHONHOME": "/m"}
    env = command("tiny", parent_env=parent).env

    assert (env["HOME"], env["CUDA_VISIBLE_DEVICES"], env["PYTHONPATH"]) == ("/h", "1", str(IN_ENGINE))
    assert not {"SERVICE_PORT", "PYTHONHOME"} & set(env)


@pytest.mark.parametrize(
    ("key", "device", "expected"),
    [
        ("tiny", "cpu", {"OMP_NUM_THREADS": "1"}),
        ("qwen3-0.6b", "cpu", {"OMP_NUM_THREADS": "5", "GOMP_SPINCOUNT": "10000"}),
        ("tiny", "cuda", {}),
        ("qwen3-0.6b", "cuda", {}),
    ],
)
def test_threads_of_an_engine_without_a_gpu_leave_a_core(
    key: str, device: str, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The API server, the gateway and other engines need one; the user's own values win."""
    monkeypatch.setattr("service.engine.cpu.os.sched_getaffinity", lambda _: range(6))
    own = {"OMP_NUM_THREADS": "7", "GOMP_SPINCOUNT": "9"}

    def openmp(env: Mapping[str, str]) -> dict[str, str]:
        return {name: value for name, value in env.items() if name in own}

    assert openmp(command(key, device=device).env) == expected
    assert openmp(command(key, device=device, parent_env=own).env) == own
    monkeypatch.setattr("service.engine.cpu.os.sched_getaffinity", lambda _: range(1))
    assert openmp(command(key, device=device).env) == expected | ({"OMP_NUM_THREADS": "1"} if expected else {})


def test_env_keeps_the_engine_from_the_network() -> None:
    """An outage of the hub cannot stop a boot, and no statistics are sent."""
    env = command("tiny", parent_env={"HF_HUB_OFFLINE": "0", "VLLM_NO_USAGE_STATS": "0"}).env

    assert (env["HF_HUB_OFFLINE"], env["TRANSFORMERS_OFFLINE"], env["VLLM_NO_USAGE_STATS"]) == ("1", "1", "1")
    assert (env["VLLM_PLUGINS"], env["VLLM_MEDIA_CONNECTOR"]) == ("vllm_service", "vllm_service")
    assert (env["PYTHONSAFEPATH"], env["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]) == ("1", "1")
    assert env["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    assert env["VLLM_MAX_IMAGE_PIXELS"] == str(1 << 26)


def test_env_keeps_idle_connections_for_longer_than_clients_do() -> None:
    """VLLM's own 5 s end connections that balancers and the gateway believe in."""
    assert command("tiny").env["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] == "75"


def test_env_on_cpu_asks_for_one_process() -> None:
    """On a GPU vLLM's own choice stays."""
    assert command("tiny", device="cpu").env["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in command("tiny").env


def test_env_on_cpu_with_fast_boot_compiles_nothing() -> None:
    """A small function that vLLM compiles on its own would need a C++ compiler, and seconds of a request."""
    assert command("tiny", device="cpu").env["TORCHDYNAMO_DISABLE"] == "1"
    assert "TORCHDYNAMO_DISABLE" not in command("tiny", EngineOptions(fast_boot=False), device="cpu").env
    assert "TORCHDYNAMO_DISABLE" not in command("tiny").env


def test_command_is_pure(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads no environment: the same arguments give the same command anywhere."""
    before = command("gpt-oss-20b")
    monkeypatch.setenv("SERVICE_PORT", "1")
    monkeypatch.setenv("FOO", "bar")

    assert command("gpt-oss-20b") == before
