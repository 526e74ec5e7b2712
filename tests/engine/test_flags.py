"""Every registry entry's command line against the pinned engine's own parser: drift fails with the flag's name."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from service.engine import flags, inherited, parsers
from service.engine.args import EngineOptions, engine_command
from service.registry import extra_args
from service.registry.models import ModelSpec, Registry

SPECS = Registry.load().specs
WEIGHTS, DRAFT = Path("/weights/model"), Path("/weights/draft")
WRONG = {
    "unknown flag": ["--model", "/weights/model", "--no-such-flag"],
    "wrong choice": ["--model", "/weights/model", "--kv-cache-dtype", "fp9"],
    "wrong value": ["--model", "/weights/model", "--max-num-seqs", "many"],
    "abbreviation": ["--model", "/weights/model", "--trust-remote"],
    "unknown pass": ["--model", "/weights/model", "-cc.pass_config.no_such_pass=true"],
}


def argv(spec: ModelSpec, device: str, fast_boot: bool) -> list[str]:
    """Return the entry's command line."""
    draft = DRAFT if spec.speculative and spec.speculative.hub_id else None
    options = EngineOptions(n_gpu=spec.n_gpu, fast_boot=fast_boot)
    return list(engine_command(spec, WEIGHTS, options, draft=draft, default_key="tiny", device=device).argv)


def name_of(key: str, device: str, fast_boot: bool) -> str:
    """Return what a command line is called."""
    return f"{key} on {device}, {'fast boot' if fast_boot else 'compiled'}"


COMMANDS = {
    name_of(key, device, fast_boot): argv(spec, device, fast_boot)
    for key, spec in SPECS.items()
    for device in ("cuda", "cpu")
    for fast_boot in (True, False)
}


@pytest.fixture(scope="module")
def engine(engine_python: str) -> dict[str, Any]:
    """What the pinned engine says of the command lines and the names it knows: one process, its imports cost 7 s."""
    asked = json.dumps({"commands": COMMANDS | WRONG})
    program = Path(__file__).with_name("known_flags.py")
    done = subprocess.run(
        [engine_python, str(program)], input=asked, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_of_an_entry_parse(engine: dict[str, Any], command: str) -> None:
    """The engine takes the command line, on both devices, compiled or not."""
    parsed = engine["parsed"][command]
    assert "error" not in parsed, parsed["error"]
    assert parsed["options"]["model"] == str(WEIGHTS)
    assert parsed["options"]["enforce_eager"] is command.endswith("fast boot")


@pytest.mark.parametrize("key", SPECS)
def test_flags_of_an_entry_mean_what_it_says(engine: dict[str, Any], key: str) -> None:
    """What was parsed for CUDA is what the entry has, field by field."""
    spec = SPECS[key]
    options = engine["parsed"][name_of(key, "cuda", True)]["options"]
    assert options["served_model_name"][0] == key
    assert options["tensor_parallel_size"] == spec.n_gpu
    assert options["tool_call_parser"] == spec.tool_call_parser
    assert options["enable_auto_tool_choice"] is bool(spec.tool_call_parser)
    assert options["reasoning_parser"] == (spec.reasoning_parser or "")
    assert options["kv_cache_dtype"] == (spec.kv_cache_dtype or "auto")
    assert options["max_model_len"] == spec.max_model_len
    assert options["async_scheduling"] is spec.async_scheduling
    assert options["middleware"] == ["vllm_service.guard.Guard"]
    assert options["shutdown_timeout"] > 0
    assert options["tool_strict_level"] == "auto"
    assert options["structured_outputs_config"]["backend"] == "auto"
    passes = options["compilation_config"]["pass_config"]
    assert {name for name in spec.fusion_passes if passes[name] is True} == set(spec.fusion_passes)
    if spec.speculative:
        assert options["speculative_config"]["num_speculative_tokens"] == spec.speculative.num_speculative_tokens
        assert options["speculative_config"]["method"] == spec.speculative.method
    if spec.limit_mm_per_prompt:
        assert set(options["limit_mm_per_prompt"]) == set(spec.limit_mm_per_prompt)


@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        ("unknown flag", "--no-such-flag"),
        ("wrong choice", "--kv-cache-dtype"),
        ("wrong value", "--max-num-seqs"),
        ("unknown pass", "no_such_pass"),
    ],
)
def test_flags_with_a_mistake_fail_with_the_name(engine: dict[str, Any], mistake: str, named: str) -> None:
    """A flag that the engine no longer has, or has otherwise, is named."""
    assert named in engine["parsed"][mistake].get("error", "it was taken")


def test_flags_that_a_deploy_knows_are_the_engines(engine: dict[str, Any]) -> None:
    """A deploy refuses an entry's extra_args by this list, since the engine is not installed where it runs."""
    assert flags.known() == set(engine["flags"])


def test_parsers_of_the_registry_are_the_engines(engine: dict[str, Any]) -> None:
    """Tool and reasoning parsers are looked up at the start only: here they are at once."""
    assert {spec.tool_call_parser for spec in SPECS.values()} - {None} <= set(engine["tool_call_parsers"])
    assert {spec.reasoning_parser for spec in SPECS.values()} - {None} <= set(engine["reasoning_parsers"])


def test_parsers_that_follow_from_a_model_are_the_engines(engine: dict[str, Any]) -> None:
    """A name that the engine lacks would end its start."""
    assert {rule.parser for rule in parsers.TOOL_RULES} <= set(engine["tool_call_parsers"])
    assert {rule.parser for rule in parsers.REASONING_RULES} <= set(engine["reasoning_parsers"])


def test_acceleration_of_the_registry_is_the_engines(engine: dict[str, Any]) -> None:
    """Backends, types, methods and passes have the names that the engine knows."""
    specs = SPECS.values()
    assert {spec.moe_backend for spec in specs} - {None} <= set(engine["moe_backends"])
    assert {spec.kv_cache_dtype for spec in specs} - {None} <= set(engine["kv_cache_dtypes"])
    assert {name for spec in specs for name in spec.fusion_passes} <= set(engine["fusion_passes"])
    drafts = [spec.speculative for spec in specs if spec.speculative]
    assert {draft.method for draft in drafts} <= set(engine["speculative_methods"])
    assert {"method", "model", "num_speculative_tokens"} <= set(engine["speculative_fields"])


def test_structured_outputs_switch_of_the_plugin_is_the_engines(engine: dict[str, Any]) -> None:
    """The plugin reads and sets fields of the engine's configuration by these names."""
    assert {"backend", "disable_any_whitespace"} <= set(engine["structured_outputs_fields"])
    assert {"auto", "xgrammar", "guidance"} <= set(engine["structured_outputs_backends"])


@pytest.mark.parametrize("command", COMMANDS)
def test_json_of_a_flag_has_fields_that_the_engine_knows(engine: dict[str, Any], command: str) -> None:
    """What is passed as JSON is checked by nobody before the start: its fields and values are compared here."""
    flags = COMMANDS[command]
    if "--speculative-config" in flags:
        speculative = json.loads(flags[flags.index("--speculative-config") + 1])
        assert set(speculative) <= set(engine["speculative_fields"])
        assert speculative["method"] in engine["speculative_methods"]
    if "--limit-mm-per-prompt" in flags:
        assert set(json.loads(flags[flags.index("--limit-mm-per-prompt") + 1])) <= {"image", "video", "audio"}


def test_variables_that_an_engine_inherits_are_vllms(engine: dict[str, Any]) -> None:
    """Each name of vLLM's own on the allow-list exists, and each prefix begins one."""
    known = {name for name in engine["variables"] if name.startswith("VLLM_")}
    assert {name for name in inherited.NAMES if name.startswith("VLLM_")} <= known
    for prefix in (prefix for prefix in inherited.PREFIXES if prefix.startswith("VLLM_")):
        assert any(name.startswith(prefix) for name in known), prefix


def test_variables_that_open_the_engine_are_not_inherited(engine: dict[str, Any]) -> None:
    """Of all that vLLM reads, none is inherited that opens routes, loads code or models, or passes the guard by."""
    risky = re.compile("_ALLOW_|DEV_MODE|PLUGIN|RUST|RESOLVER|API_KEY|S3_|_PORT$|_IP$|MODELSCOPE|DEBUG|STORE|REDIRECT")
    passed = inherited.inherited(dict.fromkeys(engine["variables"], ""))
    assert not [name for name in passed if risky.search(name)]


def test_flags_that_an_entry_may_not_use_are_vllms(engine: dict[str, Any]) -> None:
    """None of the list is stale."""
    assert set(extra_args.REFUSED) <= set(engine["flags"])
    assert extra_args.TRUST in engine["flags"]


def test_flags_that_load_code_or_pass_the_guard_by_are_refused(engine: dict[str, Any]) -> None:
    """Of all that vLLM has, those of a risky name are on the list or known to be harmless."""
    risky = re.compile(
        "plugin|-cls|class|middleware|processors|trust|local-media|api-key|token$|^--(ssl|host|port|uds|grpc|headless)|"
        "revision|-server|transfer|events|profiler|embeds|config-(path|file)|^--config$|tokenizer$|^--model$|logging-config"
    )
    harmless = {
        *(extra_args.TRUST, "--no-trust-remote-code"),  # with a pinned revision
        *("--ssl-keyfile", "--ssl-certfile", "--ssl-ca-certs", "--ssl-cert-reqs", "--ssl-ciphers"),
        *("--enable-server-load-tracking", "--return-tokens-as-token-ids", "--max-lora-cls-labels"),
        "--aggregate-engine-logging",
    }
    flags = {flag for flag in engine["flags"] if risky.search(flag) and not flag.startswith("--no-")}

    assert len(flags) > 30
    assert flags - harmless - set(extra_args.REFUSED) == set()
