"""The tiny model's tokenizer: byte-level BPE trained on the recipe's own text, with Qwen's tags as single tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tiny_dialogues import END_OF_TEXT, END_OF_TURN, TINY, Message, Render
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

VOCABULARY = 1024
MAX_POSITIONS = 4096
CONTROL_TOKENS = (END_OF_TEXT, "<|im_start|>", END_OF_TURN)
"""vLLM removes these from the text that it returns; it keeps the tags below, because its parsers search for them."""
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Each digit is a piece of its own, so that the model copies numbers digit by digit; a word keeps its leading space."""


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Train exactly `VOCABULARY` tokens: 256 bytes, the tags, and merges for the rest.

    Raises:
        ValueError: the text is too small for that many merges.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(CONTROL_TOKENS) - len(TAGS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in TAGS])
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(
            f"The text gave {tokenizer.get_vocab_size()} tokens, not {VOCABULARY}; raise TOKENIZER_SAMPLES."
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path = TINY) -> None:
    """Write tokenizer.json and tokenizer_config.json; the chat template is a separate file beside them."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TEXT,
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def template_renderer(directory: Path = TINY) -> Render:
    """Return a function that renders prompts with the directory's chat template, as vLLM does; needs no vocabulary."""
    template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), chat_template=template)

    def render(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], thinking: bool) -> str:
        parsed = [with_parsed_arguments(message) for message in messages]
        return str(
            tokenizer.apply_chat_template(
                parsed,
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=thinking,
            )
        )

    return render


def with_parsed_arguments(message: Message) -> dict[str, Any]:
    """Parse the arguments of a message's tool calls from JSON, as vLLM does before it renders the template."""
    calls = [
        {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
        for call in message.get("tool_calls", ())
    ]
    return {**message, **({"tool_calls": calls} if calls else {})}


def check_round_trip(directory: Path = TINY) -> None:
    """Check that decoding returns the encoded text and that every tag is one token.

    Raises:
        ValueError: a text changed, or a tag has several tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory)
    signs = [*range(1, 0x3000), *range(0x4E00, 0x4F00), *range(0x1F300, 0x1F700)]
    texts = ["".join(map(chr, signs[start : start + 256])) for start in range(0, len(signs), 256)]
    for text in (*texts, " a  b\r\n\t e\u0301 can't", "\n\n\n"):
        if tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) != text:
            raise ValueError(f"The tokenizer changes {text!r}: check its pre-tokenizer and decoder.")
    for tag in (*CONTROL_TOKENS, *TAGS):
        if len(tokenizer.encode(tag, add_special_tokens=False)) != 1:
            raise ValueError(f"{tag!r} is not a single token; it must be an added token.")
