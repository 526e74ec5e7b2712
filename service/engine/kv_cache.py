"""How vLLM allocates the KV cache of a model's layers: in blocks of one size for all, from one pool.

What a request takes grows with its tokens in layers that keep all of them. Windows and states take a share that does
not grow further. Where layers differ, vLLM makes groups of equally many layers, and fills what is left up.
Source: vllm/v1/core/kv_cache_utils.py and platforms/interface.py, 0.32.0; tests/engine/test_kv_cache.py compares.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from service.engine.cache_layers import CacheLayer

_BLOCK = 16  # tokens; vLLM's own on a GPU
_MLA_HYBRID_BLOCK = 128


@dataclass(frozen=True)
class _Group:
    """Layers of one kind: `count` times as many as a block holds."""

    layer: CacheLayer
    block_tokens: int
    count: int


@dataclass(frozen=True)
class KVCache:
    """The allocation on one GPU.

    Attributes:
        groups: By kind of layer.
        block_bytes: Of a block of the pool.
        in_flight_tokens: Tokens that steps may hold beyond a window.
    """

    groups: tuple[_Group, ...]
    block_bytes: int
    in_flight_tokens: int

    @classmethod
    def of(cls, layers: Sequence[CacheLayer], in_flight_tokens: int, *, block: int = _BLOCK) -> KVCache:
        """Return the allocation for these layers.

        Args:
            layers: Of the model and its draft.
            in_flight_tokens: Of a step, times the steps that overlap.
            block: Tokens of a block before it is fitted to states.
        """
        if len({(layer.kind, layer.window) for layer in layers}) <= 1:
            block_tokens = 1 if layers and layers[0].kind == "state" else block
            groups: tuple[_Group, ...] = (_Group(layers[0], block_tokens, 1),) if layers else ()
            size = sum(layer.size for layer in layers) * block_tokens
        else:
            groups, size = _mixed(layers, block)
        return cls(groups, size, in_flight_tokens)

    def blocks(self, tokens: int) -> int:
        """Return the blocks of a request with so many tokens."""
        return sum(group.count * self._blocks_of(group, tokens) for group in self.groups)

    def request_bytes(self, tokens: int) -> int:
        """Return the bytes of a request with so many tokens."""
        return self.blocks(tokens) * self.block_bytes

    @property
    def token_bytes(self) -> float:
        """What a further token of a long request takes."""
        return sum(
            group.count * self.block_bytes / group.block_tokens for group in self.groups if group.layer.kind == "full"
        )

    def sequences(self, memory_bytes: float, tokens: int) -> float:
        """Return how many requests of so many tokens a cache of this size holds."""
        blocks = self.blocks(tokens)
        return (memory_bytes // self.block_bytes) / blocks if blocks else float("inf")

    def longest(self, memory_bytes: float, limit: int) -> int:
        """Return the longest request that a cache of this size holds, in tokens; 0: none."""
        low, high = 0, limit
        usable = memory_bytes - self.block_bytes  # one block stays empty
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.request_bytes(middle) <= usable else (low, middle - 1)
        return low

    def _blocks_of(self, group: _Group, tokens: int) -> int:
        layer = group.layer
        if layer.kind == "state":
            return layer.states
        if layer.kind in {"full", "cross"}:
            return -(-(layer.window or tokens) // group.block_tokens)
        return -(-min(layer.window - 1 + self.in_flight_tokens, tokens) // group.block_tokens) + 1


def _mixed(layers: Sequence[CacheLayer], block: int) -> tuple[tuple[_Group, ...], int]:
    """Return the groups of layers of several kinds, and the size of their blocks."""
    states = [layer.size for layer in layers if layer.kind == "state"]
    attention = [layer for layer in layers if layer.kind != "state"]
    if states and attention:
        step = max(block, _MLA_HYBRID_BLOCK if attention[0].is_mla else block)
        block = step * -(-max(states) // (step * attention[0].size))
    page = max(layer.size * block for layer in attention) if attention else max(states)
    buckets: Counter[tuple[CacheLayer, int]] = Counter()
    for layer in layers:
        own = layer.size * block
        fits = layer.kind != "state" and page % own == 0
        buckets[layer, page // layer.size if fits else block] += 1
    least, most = min(buckets.values()), max(buckets.values())
    size = most if most < 1.5 * least else least
    groups = tuple(_Group(layer, tokens, -(-count // size)) for (layer, tokens), count in buckets.items())
    return groups, size * page
