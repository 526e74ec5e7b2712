"""`vllm-service models`: the registry as a table, or as JSON."""

from __future__ import annotations

from typing import Any

from service.cli.terminal import print_json, print_table, results_console
from service.errors import UnknownModelError
from service.registry.gpus import PRICES_DATE, PRICES_SOURCE
from service.registry.models import Registry, looks_like_a_source
from service.settings import Settings


def print_models(registry: Registry, default: str, as_json: bool) -> None:
    """Print the registry as a table, or as a JSON array with one object a model."""
    try:
        default_key = registry.resolve(default, Settings.model_fields["model"].default).spec.key
    except UnknownModelError:
        if not looks_like_a_source(default):
            raise
        default_key = ""  # a hub id that is in no registry can be served locally
    rows = [
        {
            "key": spec.key,
            "hub_id": spec.hub_id,
            "volume": spec.volume,
            "revision": spec.revision,
            "gpu": spec.gpu,
            "n_gpu": spec.n_gpu,
            "dollars_per_hour": round(spec.tier.dollars_per_hour, 2),
            "max_model_len": spec.max_model_len,
            "weights_gb": spec.weights_gb,
            "modalities": list(spec.modalities),
            "tool_call_parser": spec.tool_call_parser,
            "reasoning_parser": spec.reasoning_parser,
            "gated": spec.gated,
            "default": spec.key == default_key,
        }
        for spec in registry.specs.values()
    ]
    if as_json:
        print_json(rows)
        return
    headers = ("model", "GPU", "$/h", "context", "tools", "reasoning", "gated", "hub id")
    print_table(
        headers, [_cells(row, registry.specs[str(row["key"])].tier.label) for row in rows], right=("$/h", "context")
    )
    results_console().print(f"* what 'llm' means; prices per replica: {PRICES_SOURCE}, {PRICES_DATE}", markup=False)


def _cells(row: dict[str, Any], gpu_label: str) -> list[str]:
    return [
        f"{row['key']} *" if row["default"] else row["key"],
        gpu_label,
        f"{row['dollars_per_hour']:.2f}",
        "-" if row["max_model_len"] is None else f"{row['max_model_len']:,}",
        row["tool_call_parser"] or "-",
        row["reasoning_parser"] or "-",
        "yes" if row["gated"] else "no",
        row["hub_id"] or (f"upload '{row['volume']}'" if row["volume"] else "built in"),
    ]
