"""Connections that end where nobody expects it: cut within the service's process, or left by a client."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import random
import socket
import struct
from collections.abc import Callable
from typing import Any

import aiohttp
import psutil

from bench.chaos.requests import KEYS

_PIDFD_GETFD = 438  # on every architecture
_LINGER_OFF = struct.pack("ii", 1, 0)  # close() then sends RST


def cut(process: psutil.Process, chosen: Callable[[Any], bool], rng: random.Random, share: float = 0.5) -> int:
    """End the chosen connections of a process, each with a probability of `share`; return how many."""
    pidfd = os.pidfd_open(process.pid)
    libc = ctypes.CDLL(None, use_errno=True)
    number = 0
    try:
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_ESTABLISHED and chosen(connection) and rng.random() < share:
                copied = libc.syscall(_PIDFD_GETFD, pidfd, connection.fd, 0)
                if copied >= 0:  # it may have ended meanwhile
                    with socket.socket(fileno=copied) as copy, contextlib.suppress(OSError):
                        copy.shutdown(socket.SHUT_RDWR)
                        number += 1
    finally:
        os.close(pidfd)
    return number


async def leave(url: str, rng: random.Random) -> None:
    """Ask for a long answer and leave before it ends, with or without a goodbye."""
    body = {"model": rng.choice(("tiny", "twin")), "prompt": "Once", "max_tokens": 1500, "ignore_eos": True}
    body |= {"stream": rng.random() < 0.7, "n": rng.randint(1, 4)}
    headers = {"Authorization": f"Bearer {rng.choice(list(KEYS.values()))}"}
    with contextlib.suppress(TimeoutError, aiohttp.ClientError, ConnectionError):
        async with (
            aiohttp.ClientSession() as http,
            asyncio.timeout(rng.uniform(0.05, 0.6)),
            http.post(f"{url}/v1/completions", json=body, headers=headers) as answer,
        ):
            if (connection := answer.connection) and connection.transport and rng.random() < 0.5:
                raw: socket.socket = connection.transport.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_OFF)
            await answer.read()
