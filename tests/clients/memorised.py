"""What the agents' model has memorised; its recipe (`models/agents_model.py`) and the tests read it from here.

Each agent gets a call of its own tool that writes a file, and after the tool's result a last sentence.
"""

from __future__ import annotations

import json

FILE = "hello.txt"
CONTENT = {
    "Write": "Hello from Claude Code.\n",
    "exec_command": "Hello from Codex.\n",
    "write": "Hello from opencode.\n",
}
"""What each tool writes; their names differ, so the name tells whose request it is."""
CALLS = {
    "Write": {"file_path": FILE, "content": CONTENT["Write"]},
    "exec_command": {"cmd": f"echo '{CONTENT['exec_command'].strip()}' > {FILE}"},
    "write": {"filePath": FILE, "content": CONTENT["write"]},
}
ANSWER = f"I wrote {FILE}."
TITLE = "Writing a file"
ANSWERS = {
    **{
        name: f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
        for name, arguments in CALLS.items()
    },
    "tool result": ANSWER,
    "no tools": TITLE,  # what an agent asks without tools is a title for the conversation
}
"""What follows the line that ends a prompt."""
