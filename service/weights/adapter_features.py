"""What in a LoRA adapter's configuration vLLM does not serve: an engine that is booted with such an adapter ends.

Source: `PEFTHelper` in vllm/lora/peft_helper.py of vLLM 0.32.0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_FEATURES = {  # field -> what it stands for
    "use_dora": "DoRA",
    "lora_bias": "a bias of LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "repeated layers",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
}
_SAVED = {"classifier", "score"}  # modules of classification
_INITIAL = {"gaussian", "eva", "orthogonal", "mica", "lora_ga"}  # others change the model's own weights


def why_unsupported(config: Mapping[str, Any]) -> str | None:
    """Return what of an adapter's configuration vLLM does not serve, as `field is value`; None: it serves all."""
    return next(_faults(config), None)


def _faults(config: Mapping[str, Any]) -> Iterator[str]:
    for field, what in _FEATURES.items():
        if value := config.get(field):
            yield f"{field} is {value!r} ({what})"
    if (bias := config.get("bias", "none")) != "none":
        yield f"bias is {bias!r}"
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not {str(name) for name in saved} <= _SAVED:
        yield f"modules_to_save is {saved!r} (whole modules beside the LoRA)"
    initial = config.get("init_lora_weights", True)
    if isinstance(initial, str) and initial.lower() not in _INITIAL:
        yield f"init_lora_weights is {initial!r} (it changes the model's own weights)"
    rank = config.get("r")
    if not _is_rank(rank):
        yield f"r is {rank!r} (a whole number above 0 is expected)"
    if not _is_number(config.get("lora_alpha")):
        yield f"lora_alpha is {config.get('lora_alpha')!r} (a number is expected)"
    if "target_modules" not in config:
        yield "target_modules is missing"
    for field, fits, expected in (
        ("rank_pattern", _is_rank, "whole numbers above 0"),
        ("alpha_pattern", _is_number, "numbers"),
    ):
        pattern = config.get(field) or {}
        if not isinstance(pattern, dict) or not all(map(fits, pattern.values())):
            yield f"{field} is {pattern!r} (names with {expected} are expected)"
        elif wrong := [name for name in pattern if not _is_expression(name)]:
            yield f"{field} has {wrong[0]!r} (a regular expression for the names of modules is expected)"


def _is_expression(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
