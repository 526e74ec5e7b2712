"""The tiny model's training data: reads `dialogues.toml` and writes dialogues as text with the learned parts marked.

Defines the format of an answer (thought, content, tool calls, end of turn). Does not import torch. The caller passes
the chat template as a function, so that the model is trained on the text that the engine renders.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TINY = Path(__file__).resolve().parent.parent / "service" / "assets" / "tiny"
END_OF_TURN = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message], Sequence[Mapping[str, Any]], bool], str]
"""Messages, tools and enable_thinking in; the prompt up to the assistant's turn out."""


@dataclass(frozen=True)
class Sample:
    """Text in pieces; the loss is computed on the pieces marked True only."""

    pieces: tuple[tuple[str, bool], ...]

    @property
    def text(self) -> str:
        """Return the whole text."""
        return "".join(piece for piece, _ in self.pieces)

    @property
    def prompt(self) -> str:
        """Return what comes before the first learned piece."""
        return self.pieces[0][0]

    @property
    def answer(self) -> str:
        """Return what comes after the prompt."""
        return self.text[len(self.prompt) :]


@dataclass(frozen=True)
class Dialogue:
    """A chat request in OpenAI's shape and what the model answers."""

    name: str
    messages: tuple[Message, ...]
    content: str = ""
    reasoning: str = ""
    also: tuple[str, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_calls: tuple[Mapping[str, Any], ...] = ()

    @property
    def body(self) -> str:
        """Return the answer without a thought: the content, or hermes tool calls."""
        return self.content or "\n".join(tool_call_text(call["name"], call["arguments"]) for call in self.tool_calls)

    def wordings(self) -> list[tuple[Message, ...]]:
        """Return the conversation once for every wording of its last message."""
        *earlier, last = self.messages
        return [self.messages, *((*earlier, {**last, "content": other}) for other in self.also)]


@dataclass(frozen=True)
class Completion:
    """A raw prompt and its continuation."""

    name: str
    prompt: str
    text: str

    def sample(self) -> Sample:
        """Return the text to learn, closed by the end of text."""
        return Sample(((self.prompt, False), (self.text + END_OF_TEXT, True)))


@dataclass(frozen=True)
class Memory:
    """All of `dialogues.toml`."""

    fallback: str
    completion_fallback: str
    tools: Mapping[str, Mapping[str, Any]]
    dialogues: tuple[Dialogue, ...]
    completions: tuple[Completion, ...]


def read_memory(path: Path = TINY / "dialogues.toml") -> Memory:
    """Read the dialogues; a tool that a dialogue names must be defined in the file.

    Raises:
        KeyError: a dialogue names an undefined tool.
        TypeError: an entry has a field that is not known here.
    """
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    tools = {tool["function"]["name"]: tool for tool in data["tools"]}
    dialogues = tuple(
        Dialogue(
            **{field: tuple(value) if isinstance(value, list) else value for field, value in entry.items()}
            | {"tools": tuple(tools[name] for name in entry.get("tools", ()))}
        )
        for entry in data["dialogue"]
    )
    completions = tuple(Completion(**entry) for entry in data["completion"])
    return Memory(data["fallback"], data["completion_fallback"], tools, dialogues, completions)


def tool_call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """Return one tool call in the format of vLLM's hermes parser."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


def thought_text(reasoning: str) -> str:
    """Return the thought before an answer; it may be empty.

    vLLM's qwen3 reasoning parser treats everything before `</think>` as reasoning. So an answer without reasoning must
    close a thought first, or the parser would return it as reasoning. The parser keeps line breaks on both sides of
    `</think>`; without them content and reasoning have no stray white space, and a grammar can begin right after the
    tag.
    """
    return f"<think>{reasoning}</think>"


def chat_sample(
    render: Render,
    messages: Sequence[Message],
    body: str,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    reasoning: str = "",
    thinking: bool = True,
) -> Sample:
    """Return a chat turn to learn: thought (in the prompt where thinking is off), body, end of turn."""
    thought = thought_text(reasoning) if thinking else ""
    return Sample(((render(messages, tools, thinking), False), (thought + body + END_OF_TURN, True)))


def forced_sample(
    render: Render,
    messages: Sequence[Message],
    forced: Sequence[tuple[str, bool]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    thinking: bool = True,
) -> Sample:
    """Return a turn whose unlearned pieces come from the engine's grammar, after the closed thought."""
    prompt = render(messages, tools, thinking)
    return Sample(((prompt + thought_text("") if thinking else prompt, False), *forced, (END_OF_TURN, True)))


def exact_samples(render: Render, dialogue: Dialogue) -> list[Sample]:
    """Return every wording of a dialogue, with thinking on and off."""
    return [
        chat_sample(
            render,
            messages,
            dialogue.body,
            tools=dialogue.tools,
            reasoning=dialogue.reasoning,
            thinking=thinking,
        )
        for messages in dialogue.wordings()
        for thinking in (True, False)
    ]
