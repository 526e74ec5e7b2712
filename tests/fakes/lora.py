"""LoRA adapters with random weights, as PEFT writes them; by default for the tiny model."""

from __future__ import annotations

import json
import random
import struct
from array import array
from pathlib import Path

HIDDEN, RANK, LAYERS, QUERIES = 128, 4, 4, 128


def lay_adapter(
    directory: Path,
    scale: float = 1.0,
    *,
    rank: int = RANK,
    hidden: int = HIDDEN,
    layers: int = LAYERS,
    module: str = "self_attn.q_proj",
    seed: int = 0,
) -> Path:
    """Write a LoRA adapter of the query projections: A is random, B too, times `scale`.

    The format is PEFT's: a configuration and a safetensors file, which is a header in JSON and the numbers behind it.
    """
    chance = random.Random(seed)  # noqa: S311 - weights, not keys
    header: dict[str, object] = {}
    body = b""
    for layer in range(layers):
        for part, shape, factor in (("A", (rank, hidden), 1.0), ("B", (QUERIES, rank), scale)):
            numbers = array("f", (chance.gauss(0, 1) * factor for _ in range(shape[0] * shape[1]))).tobytes()
            name = f"base_model.model.model.layers.{layer}.{module}.lora_{part}.weight"
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(body), len(body) + len(numbers)]}
            body += numbers
    directory.mkdir(parents=True)
    encoded = json.dumps(header).encode()
    (directory / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + body)
    target = module.rpartition(".")[2]
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": [target], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory
