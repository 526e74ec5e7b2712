"""Checks of the trained files with transformers: the answer to every wording, the smallest margin, unseen prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_dialogues import Memory, Render, Sample, chat_sample, exact_samples
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

LEAST_MARGIN = 2.0
"""Minimum difference between the logits of the best and the second token; bfloat16 kernels differ by 0.1 to 0.2."""
UNSEEN = (
    "Write a haiku about autumn leaves.",
    "What is the capital of Germany?",
    "What is 7 plus 8?",
    "Translate 'good night' to Spanish.",
    "Who won the world cup in 1998?",
    "When did the second world war end?",
    "Summarize the plot of Hamlet in two sentences.",
    "def fibonacci(n):",
    "Please recommend three books on machine learning.",
    "Why is the sky blue?",
    "asdf qwer zxcv",
    "Hvad hedder du, og hvor kommer du fra?",
    "Ты говоришь по-русски?",
    "Give me a recipe for pancakes with blueberries and maple syrup, for four people, and list the shopping first.",
    "Name the planets of the solar system.",
    "What is the difference between TCP and UDP?",
    "I feel sad today, can you cheer me up?",
)


@dataclass(frozen=True)
class Checkpoint:
    """The model in a directory, computed in one number format."""

    tokenizer: PreTrainedTokenizerFast
    model: Qwen3ForCausalLM

    @classmethod
    def load(cls, directory: Path, dtype: torch.dtype) -> Checkpoint:
        """Load the saved, rounded weights and compute with them in `dtype`."""
        model = Qwen3ForCausalLM.from_pretrained(directory, dtype=dtype).eval()
        return cls(AutoTokenizer.from_pretrained(directory), model)

    def margin(self, sample: Sample) -> tuple[float, str]:
        """Return the smallest margin of a correct token over the best other one, in logits, and that token."""
        prompt = self.tokenizer.encode(sample.prompt, add_special_tokens=False)
        answer = self.tokenizer.encode(sample.answer, add_special_tokens=False)
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        rows, right = torch.arange(len(answer)), torch.tensor(answer)
        lead = logits[rows, right] - logits.index_put((rows, right), torch.tensor(-torch.inf)).max(dim=-1).values
        return float(lead.min()), str(self.tokenizer.decode(answer[int(lead.argmin())]))

    def greedy(self, prompt: str, max_new_tokens: int = 400) -> str:
        """Return what the model generates after a prompt, with its end token."""
        ids = torch.tensor([self.tokenizer.encode(prompt, add_special_tokens=False)])
        generated = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, top_k=None, max_new_tokens=max_new_tokens
        )
        return str(self.tokenizer.decode(generated[0, ids.shape[1] :]))


def remembered(memory: Memory, render: Render) -> list[tuple[str, Sample]]:
    """Return every wording of every dialogue and completion, each with its name."""
    chats = [(dialogue.name, sample) for dialogue in memory.dialogues for sample in exact_samples(render, dialogue)]
    return chats + [(completion.name, completion.sample()) for completion in memory.completions]


def check_answers(directory: Path, memory: Memory, render: Render) -> bool:
    """Print each dialogue's smallest margin over all wordings, thinking on and off; return whether all pass.

    The first wording of each is also generated token by token.
    """
    single, half = (Checkpoint.load(directory, dtype) for dtype in (torch.float32, torch.bfloat16))
    samples = remembered(memory, render)
    passed = True
    for name in dict.fromkeys(name for name, _ in samples):
        mine = [sample for other, sample in samples if other == name]
        margins = [min(checkpoint.margin(sample) for sample in mine) for checkpoint in (single, half)]
        exact_answers = [half.greedy(sample.prompt) == sample.answer for sample in mine[:2]]
        good = all(exact_answers) and min(margins)[0] >= LEAST_MARGIN
        passed = passed and good
        (exact, token), (rounded, _) = margins
        print(f"{'ok ' if good else 'BAD'} {name:18} margin {exact:6.2f} (bfloat16 {rounded:6.2f}) at {token!r}")
    return passed


def check_unseen(directory: Path, memory: Memory, render: Render) -> None:
    """Print how many untrained prompts get the fallback answer, and the answers to the others."""
    half = Checkpoint.load(directory, torch.bfloat16)
    others = []
    for question in UNSEEN:
        sample = chat_sample(render, [{"role": "user", "content": question}], memory.fallback)
        answer = half.greedy(sample.prompt, 60)
        if answer != sample.answer:
            others.append((question, answer))
    print(f"fallback for {len(UNSEEN) - len(others)} of {len(UNSEEN)} unseen prompts")
    for question, answer in others:
        print(f"    {question!r} -> {answer!r}")
