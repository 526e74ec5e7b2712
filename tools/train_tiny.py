"""Train the built-in tiny model from its dialogues: `service/assets/tiny/` is what this recipe wrote.

Run it with the Python of the engine's environment (torch, transformers, tokenizers, safetensors; no GPU, no network):

    <engine's python> tools/train_tiny.py                 # trains, saves, checks, prints sizes and sha256
    <engine's python> tools/train_tiny.py --check-only    # checks the existing files

In that directory dialogues.toml (what the model memorises) and chat_template.jinja are written by hand; this script
writes all other files. With the seed, two threads and deterministic kernels a second run on the same machine writes the
same bytes. Another processor or another version of torch may round differently and give other weights with the same
answers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_checks import check_answers, check_unseen
from tiny_dialogues import END_OF_TEXT, END_OF_TURN, TINY, Sample, read_memory
from tiny_tokenizer import (
    MAX_POSITIONS,
    VOCABULARY,
    check_round_trip,
    save_tokenizer,
    template_renderer,
    train_tokenizer,
)
from tiny_variety import Variety
from tokenizers import Tokenizer
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

SEED = 3
THREADS = 2
TOKENIZER_SAMPLES = 4000
STEPS = 1800
PEAK_LR = 2.5e-3
WARMUP_STEPS = 100
TOKENS_PER_BATCH = 3072
DRAWN_AT_ONCE = 1024
IGNORED = -100

Batch = tuple[torch.Tensor, torch.Tensor]


def tiny_config() -> Qwen3Config:
    """Return a real Qwen3 architecture of 0.9 million parameters.

    `head_dim` is 32, the minimum of the attention in vLLM's CPU build.
    """
    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=0.04,
    )


def encode(tokenizer: Tokenizer, sample: Sample) -> tuple[list[int], list[int]]:
    """Return token ids and labels; each piece is encoded separately, since a grammar starts at a token boundary."""
    ids: list[int] = []
    labels: list[int] = []
    for piece, learned in sample.pieces:
        tokens = tokenizer.encode(piece, add_special_tokens=False).ids
        ids += tokens
        labels += tokens if learned else [IGNORED] * len(tokens)
    return ids, labels


def pad(rows: list[tuple[list[int], list[int]]]) -> Batch:
    """Stack rows, padded on the right; attention is causal, so padding does not change the tokens before it."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows])
    return ids, labels


def batches(tokenizer: Tokenizer, variety: Variety) -> Iterator[Batch]:
    """Draw samples without end, in batches of similar length."""
    while True:
        rows = sorted(
            (encode(tokenizer, sample) for sample in variety.draw(DRAWN_AT_ONCE)), key=lambda row: len(row[0])
        )
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for row in rows:
            if groups[-1] and (len(groups[-1]) + 1) * len(row[0]) > TOKENS_PER_BATCH:
                groups.append([])
            groups[-1].append(row)
        variety.rng.shuffle(groups)
        yield from map(pad, groups)


def learning_rate(step: int, steps: int) -> float:
    """Return the rate of a step: linear warm-up, then a cosine down to zero."""
    return PEAK_LR * min(step / WARMUP_STEPS, 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(model: PreTrainedModel, source: Iterator[Batch], steps: int = STEPS) -> None:
    """Train in float32 on the learned tokens of each batch."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))
    started = time.monotonic()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        ids, labels = next(source)
        logits = model(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.monotonic() - started:5.0f} s", flush=True)


def save_model(model: PreTrainedModel, tokenizer: Tokenizer, directory: Path) -> None:
    """Round to bfloat16; write weights, configuration and generation defaults that make decoding greedy."""
    ends = [tokenizer.token_to_id(END_OF_TURN), tokenizer.token_to_id(END_OF_TEXT)]
    weights = {name: tensor.bfloat16().contiguous() for name, tensor in model.state_dict().items()}
    weights.pop("lm_head.weight")  # tied to the embedding
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # save_file makes it readable by its owner only
    config = model.config.to_diff_dict() | {
        "architectures": [type(model).__name__],
        "dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": ends[0],
        "pad_token_id": ends[1],
    }
    generation = {"do_sample": True, "top_k": 1, "eos_token_id": ends, "pad_token_id": ends[1]}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def build(directory: Path) -> None:
    """Train tokenizer and model from scratch and write them."""
    torch.manual_seed(SEED)
    memory, render = read_memory(directory / "dialogues.toml"), template_renderer(directory)
    texts = (sample.text for sample in Variety(memory, render, SEED).draw(TOKENIZER_SAMPLES))
    tokenizer = train_tokenizer(text for text in texts if text.isascii())  # other characters stay bytes
    model = Qwen3ForCausalLM(tiny_config())
    print(f"{model.num_parameters():,} parameters, seed {SEED}, {STEPS} steps")
    train(model, batches(tokenizer, Variety(memory, render, SEED + 1)))
    save_tokenizer(tokenizer, directory)
    save_model(model, tokenizer, directory)


def check(directory: Path) -> bool:
    """Check the written files without vLLM: answers, margins, unseen prompts; print their sizes and checksums."""
    check_round_trip(directory)
    memory, render = read_memory(directory / "dialogues.toml"), template_renderer(directory)
    passed = check_answers(directory, memory, render)
    check_unseen(directory, memory, render)
    for path in sorted(directory.iterdir()):
        print(f"{path.stat().st_size:>9,} B  {hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}")
    return passed


def main() -> int:
    """Train (not with --check-only), then check and report; return 0 if every dialogue passes."""
    parser = argparse.ArgumentParser(description="Train and check the built-in tiny model.")
    parser.add_argument("--check-only", action="store_true", help="check the existing files; do not train")
    parser.add_argument("--directory", type=Path, default=TINY, help="holds dialogues.toml and chat_template.jinja")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    if not arguments.check_only:
        build(arguments.directory)
    return 0 if check(arguments.directory) else 1


if __name__ == "__main__":
    raise SystemExit(main())
