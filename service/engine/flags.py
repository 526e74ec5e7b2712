"""The flags that the pinned engine knows: `extra_args` with another would end its start on the GPU."""

from __future__ import annotations

from functools import cache

from service.engine.environment import PINS
from service.errors import RegistryError, did_you_mean
from service.registry.models import ModelSpec


@cache
def known() -> frozenset[str]:
    """Return the flags of `vllm serve`, as its own parser lists them."""
    return frozenset((PINS / "engine-flags.txt").read_text().split())


def check(spec: ModelSpec) -> None:
    """Refuse an entry whose `extra_args` have a flag that the engine does not know.

    Raises:
        RegistryError: It has one; the hint offers the nearest.
    """
    for argument in spec.extra_args:
        # vLLM takes underscores for dashes, and a dot for a field of a flag whose value is JSON
        flag = argument.partition("=")[0].partition(".")[0].replace("_", "-")
        if flag.startswith("--") and flag not in known():
            raise RegistryError(
                f"Model '{spec.key}': extra_args has '{argument}', which vLLM does not know.",
                hint=f"{did_you_mean(flag, known()).strip()} 'vllm serve --help=all' lists every flag.".strip(),
            )
