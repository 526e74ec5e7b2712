"""Configurations of LoRA adapters, read by vLLM itself and by the check before a boot."""

from __future__ import annotations

import itertools
import json
import subprocess

from service.weights.adapter_features import why_unsupported

READS = """
import json, sys
from types import SimpleNamespace
from vllm.lora.peft_helper import PEFTHelper

for config in json.load(sys.stdin):
    try:
        helper = PEFTHelper.from_dict(config)
        helper.validate_legal(SimpleNamespace(max_lora_rank=64))
        rank, scaling = helper.get_rank_and_scaling("model.layers.0.self_attn.q_proj")
        print(json.dumps([rank, float(scaling)]))
    except Exception as error:
        print(json.dumps(f"{type(error).__name__}: {error}"))
"""
BASE = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
VALUES = (
    None,
    True,
    False,
    0,
    1,
    -1,
    4.5,
    "none",
    "all",
    "4",
    "gaussian",
    "PiSSA",
    [],
    ["score"],
    ["lm_head"],
    [[0, 2]],
)
PATTERNS = (
    {},
    {"q_proj": 4},
    {"q_proj": 0},
    {"q_proj": 4.5},
    {"q_proj": "4"},
    {"q_proj": None},
    {"(": 4},
    {"q_proj(": 4},
)
FIELDS = (
    *("r", "lora_alpha", "bias", "modules_to_save", "use_rslora", "use_dora", "lora_bias", "init_lora_weights"),
    *("alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora", "rank_pattern", "alpha_pattern"),
    "of_a_later_release",
)


def test_configuration_that_vllm_refuses_is_refused_before_a_boot(engine_python: str) -> None:
    """Each field with values of every kind, patterns beside each rank, and each required field left out."""
    configs = [BASE, *({name: BASE[name] for name in BASE if name != left_out} for left_out in BASE)]
    configs += [BASE | {field: value} for field in FIELDS for value in (*VALUES, *PATTERNS)]
    pairs = itertools.product(PATTERNS, PATTERNS, (8, 0, "8"))
    configs += [BASE | {"r": rank, "rank_pattern": ranks, "alpha_pattern": alphas} for ranks, alphas, rank in pairs]
    done = subprocess.run(
        [engine_python, "-c", READS],
        input=json.dumps(configs),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    read = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("[", '"'))]
    assert len(read) == len(configs)
    refused = (config for config, theirs in zip(configs, read, strict=True) if isinstance(theirs, str))
    missed = [config for config in refused if not why_unsupported(config)]
    assert missed == []
    assert not why_unsupported(BASE)
    assert not why_unsupported(BASE | {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 4.5}})
