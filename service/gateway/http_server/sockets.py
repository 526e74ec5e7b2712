"""What a transport's socket tells that the transport does not."""

from __future__ import annotations

import asyncio
import select


def has_unread(transport: asyncio.BaseTransport) -> bool:
    """Tell whether bytes, or the end of the connection, have arrived and wait for this process to read them."""
    poll = select.poll()
    poll.register(transport.get_extra_info("socket"), select.POLLIN)
    return bool(poll.poll(0))
