"""Write a tiny Whisper with random weights as a model directory, with a tokenizer of bytes and Whisper's own tokens.

<engine's python> tests/engine/hearing.py DIRECTORY
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def build(directory: Path) -> None:
    """Write config, tokenizer, feature extractor and safetensors: two layers of each kind, pieces of 30 s."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    torch.manual_seed(0)
    letters = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    special = [
        *("<|endoftext|>", "<|startoftranscript|>"),
        *(f"<|{language}|>" for language in LANGUAGES),
        *("<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"),
        *(f"<|{step * 0.02:.2f}|>" for step in range(1501)),
    ]
    tokenizer = WhisperTokenizer(vocab={**letters, "<|endoftext|>": len(letters)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    end, start = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|startoftranscript|>"])
    config = WhisperConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        num_mel_bins=80,
        d_model=64,
        **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in _LAYERS.items()},
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    WhisperForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": end, "pad_token_id": end}))
    WhisperFeatureExtractor(feature_size=80).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


_LAYERS = {"layers": 2, "attention_heads": 2, "ffn_dim": 128}

if __name__ == "__main__":
    build(Path(sys.argv[1]))
