"""Train the model that the agents of the tests talk to: a real architecture that has memorised `memorised.ANSWERS`.

    PYTHONPATH=tools:. <engine's python> tests/clients/models/agents_model.py DIRECTORY

An agent sends tens of thousands of tokens, and other ones in each of its versions. The model reads all of them, but its
attention is a sliding window: no answer depends on what lies further back than WINDOW tokens a layer. Its chat template
ends a prompt with a filler of that length and one line, which says which tool is there or that a result is. So each
answer depends on that line alone. Tokenizer and the rest of the template are those of the built-in tiny model.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import torch
from tiny_checks import LEAST_MARGIN
from tiny_dialogues import END_OF_TURN, TINY
from tokenizers import Tokenizer
from train_tiny import IGNORED, pad, save_model, train
from transformers import MistralConfig, MistralForCausalLM

from tests.clients import memorised

CONTEXT = 131072
WINDOW, LAYERS = 64, 2
FILLER = "<|im_start|>" * (WINDOW * LAYERS)  # one token each
SEED, STEPS = 1, 150
CUE = """
{%- if add_generation_prompt -%}
  {%- set cue = namespace(text='no tools') -%}
  {%- for tool in tools or [] if tool.function.name in TOOLS -%}
    {%- set cue.text = tool.function.name -%}
  {%- endfor -%}
  {%- for message in messages if message.role == 'tool' -%}
    {%- set cue.text = 'tool result' -%}
  {%- endfor -%}
  {{- 'FILLER' ~ cue.text ~ '\\n' -}}
{%- endif -%}
"""
Row = tuple[list[int], list[int]]


def rows(tokenizer: Tokenizer) -> list[Row]:
    """Return every prompt's end and its answer as tokens."""
    return [
        (tokenizer.encode(f"{FILLER}{cue}\n").ids, tokenizer.encode(answer + END_OF_TURN).ids)
        for cue, answer in memorised.ANSWERS.items()
    ]


def untrained(vocabulary: int) -> MistralForCausalLM:
    """Return a Mistral of 0.4 million parameters."""
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            sliding_window=WINDOW,
            tie_word_embeddings=True,
            initializer_range=0.04,
        )
    )


def build(directory: Path) -> None:
    """Train the model and write it.

    Raises:
        ValueError: It has not learned an answer.
    """
    torch.manual_seed(SEED)
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    model = untrained(tokenizer.get_vocab_size())
    samples = rows(tokenizer)
    batch = pad([(prompt + answer, [IGNORED] * len(prompt) + answer) for prompt, answer in samples])
    train(model, itertools.repeat(batch), STEPS)
    directory.mkdir(exist_ok=True)
    save_model(model, tokenizer, directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = json.loads((TINY / "tokenizer_config.json").read_text()) | {"model_max_length": CONTEXT}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    cue = CUE.replace("TOOLS", str(tuple(memorised.CALLS))).replace("FILLER", FILLER)
    (directory / "chat_template.jinja").write_text((TINY / "chat_template.jinja").read_text() + cue)
    check(directory, samples)


def check(directory: Path, samples: list[Row]) -> None:
    """Refuse written weights that give an answer's token no lead, after tokens that were not in the training."""
    model = MistralForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    for prompt, answer in samples:
        other = [token % 1000 for token in range(2000)]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([other + prompt + answer])).logits[0, -len(answer) - 1 : -1].float()
        places, right = torch.arange(len(answer)), torch.tensor(answer)
        lead = logits[places, right] - logits.index_put((places, right), torch.tensor(-torch.inf)).max(-1).values
        if lead.min() < LEAST_MARGIN:
            raise ValueError(f"An answer's token leads by {lead.min():.2f}, not {LEAST_MARGIN}; raise STEPS ({STEPS}).")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
