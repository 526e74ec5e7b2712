"""Node's fetch with pauses shorter and longer than the server keeps an idle connection."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

from service.gateway.http_server.limits import Limits
from tests.gateway.upstream import Engine, answers, serve_gateway

from . import client_env

KEPT = Limits(keep_alive_s=2)
CONNECTIONS, SECONDS, PAUSE_S = 64, 15, 3.0
PROGRAM = Path(__file__).parents[2] / "bench" / "pooled.mjs"
BODY = json.dumps({"model": "tiny", "messages": []})


def test_node_with_pauses_never_fails() -> None:
    """The server keeps connections for 2 s and tells it in `Keep-Alive`, which Node follows."""
    rng = random.Random(7)  # noqa: S311 - no secret
    pauses = json.dumps([[rng.uniform(0, PAUSE_S) for _ in range(SECONDS)] for _ in range(CONNECTIONS)])

    async def run() -> bytes:
        async with (
            Engine(answers).serving() as engine,
            serve_gateway(url=engine.url, limits=KEPT) as to,
        ):
            arguments = [str(PROGRAM), f"{to.url}/v1/chat/completions", BODY, str(CONNECTIONS), str(SECONDS), pauses]
            pipe = asyncio.subprocess.PIPE
            node = await asyncio.create_subprocess_exec(client_env.node(), *arguments, stdout=pipe)
            return (await node.communicate())[0]

    done = json.loads(asyncio.run(run()))
    assert done["requests"] > CONNECTIONS
    assert done["failures"] == []
