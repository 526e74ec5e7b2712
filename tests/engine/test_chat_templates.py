"""The chat templates of our own, rendered as the engine renders them, and their calls read back by vLLM's parser."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from service.engine import environment
from service.registry.models import BUILT_IN, Registry

RENDER = """
import ast, json, sys
from transformers.utils.chat_template_utils import render_jinja_template
source, conversation, tools = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
prompts, _ = render_jinja_template([conversation], tools, chat_template=open(source).read(),
                                   add_generation_prompt=True, bos_token="<bos>")
print(json.dumps(prompts[0]))
"""
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {
    "name": "weather",
    "arguments": {"city": 'Par"is', "days": 2, "exact": True, "note": None, "of": ["a", {"b": 1}]},
}
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "Where is this, and what is the weather?"}],
    },
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "content": "sunny"},
    {"role": "tool", "content": "18 degrees"},
    {"role": "assistant", "content": "Sunny, 18 degrees."},
    {"role": "user", "content": "Thanks."},
]


def render(template: Path, tools: list[object]) -> str:
    """Return the prompt of the conversation."""
    python = environment.ensure().python
    arguments = [python, "-c", RENDER, str(template), json.dumps(CONVERSATION), json.dumps(tools)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=True)
    return str(json.loads(done.stdout.splitlines()[-1]))


def test_gemma_template_writes_turns_tools_and_results() -> None:
    """System words and tools precede the first question; calls are Python; results share a user's turn."""
    template = Registry.load().specs["gemma-3-12b"].chat_template
    assert template
    prompt = render(BUILT_IN.parents[1] / template, [WEATHER])
    called = 'weather(city="Par\\"is", days=2, exact=True, note=None, of=["a", {"b": 1}])'
    turns = prompt.split("<start_of_turn>")
    assert turns[0] == "<bos>"
    assert turns[1].startswith("user\nBe brief.\n\nYou may call these functions")
    assert turns[1].endswith("<start_of_image>Where is this, and what is the weather?<end_of_turn>\n")
    assert '"name": "weather"' in turns[1]
    assert turns[2:] == [
        f"model\n[{called}]<end_of_turn>\n",
        "user\nResult: sunny\nResult: 18 degrees<end_of_turn>\n",
        "model\nSunny, 18 degrees.<end_of_turn>\n",
        "user\nThanks.<end_of_turn>\n",
        "model\n",
    ]


def test_gemma_template_without_tools_mentions_none() -> None:
    """A plain chat is Gemma's own form, with the system's words before the first question."""
    template = Registry.load().specs["gemma-3-27b"].chat_template
    assert template
    prompt = render(BUILT_IN.parents[1] / template, [])
    assert prompt.startswith("<bos><start_of_turn>user\nBe brief.\n\n<start_of_image>Where is this")
    assert "functions" not in prompt
