"""What the incomplete heads of all connections take is bounded."""

from __future__ import annotations

from vllm_service.incomplete_heads import IncompleteHeads

KIB = 1024


def test_incomplete_heads_fit_after_each_read_whatever_the_oldest_take() -> None:
    """Many small ones, then large ones: as many of the oldest end as it takes, in their order, each once."""
    heads = IncompleteHeads[int](1024 * KIB)
    held: dict[int, int] = {}
    ended = []
    for connection, size in enumerate([KIB + 100] * 800 + [128 * KIB] * 20):
        held[connection] = size
        for ending in heads.hold(connection, size):
            del held[ending]
            ended.append(ending)
        assert sum(held.values()) <= 1024 * KIB
    assert ended == [*range(len(ended))]
    assert len(held) == 8


def test_incomplete_head_that_grew_or_was_released_counts_as_it_is() -> None:
    """Its place is that of its beginning."""
    heads = IncompleteHeads[str](10 * KIB)
    assert heads.hold("a", 2 * KIB) == heads.hold("b", 2 * KIB) == heads.hold("a", 8 * KIB) == []
    heads.release("b")
    assert heads.hold("c", 2 * KIB) == []
    assert heads.hold("c", 3 * KIB) == ["a"]
    assert heads.hold("d", 11 * KIB) == ["c", "d"]
