"""The tools of an MCP server, as an agent gets them: over the server's standard input and output."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

SERVERS = {  # name -> program in node_modules/.bin, with its arguments
    "filesystem": ["mcp-server-filesystem", "/tmp"],  # noqa: S108 - nothing is called
    "everything": ["mcp-server-everything"],
    "playwright": ["playwright-mcp"],
}
_CLIENT = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "tests", "version": "1"}}


def tools(node_modules: Path, server: str) -> list[dict[str, Any]]:
    """Return a server's tools, each with `name`, `description` and `inputSchema`."""
    program, *arguments = SERVERS[server]
    command = [str(node_modules / ".bin" / program), *arguments]
    env = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"]}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, text=True
    ) as process:
        try:
            _call(process, 1, "initialize", _CLIENT)
            _send(process, {"method": "notifications/initialized"})
            return list(_call(process, 2, "tools/list", {})["tools"])
        finally:
            process.kill()


def _call(process: subprocess.Popen[str], number: int, method: str, params: dict[str, Any]) -> dict[str, Any]:
    _send(process, {"id": number, "method": method, "params": params})
    assert process.stdout is not None  # noqa: S101 - it is a pipe
    for line in process.stdout:
        message = json.loads(line)
        if message.get("id") == number and "result" in message:
            return dict(message["result"])
    raise SystemExit(f"The MCP server ended before it answered {method}.")


def _send(process: subprocess.Popen[str], message: dict[str, Any]) -> None:
    assert process.stdin is not None  # noqa: S101 - it is a pipe
    process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
    process.stdin.flush()
