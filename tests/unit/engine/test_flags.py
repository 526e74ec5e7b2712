"""The flags of the engine that an entry's `extra_args` may have."""

from __future__ import annotations

import pytest

from service.engine import flags
from service.errors import RegistryError
from service.registry.models import ModelSpec, Registry


def spec(*extra_args: str) -> ModelSpec:
    """Return an entry with these arguments."""
    return ModelSpec(key="mine", hub_id="me/mine", extra_args=extra_args)


@pytest.mark.parametrize(
    "argument",
    ["--max-num-seqs", "--max_num_seqs=4", "--compilation-config.level=3", "--no-enable-prefix-caching", "-O3", "4"],
)
def test_flag_of_the_engine_is_taken(argument: str) -> None:
    """In each way that vLLM takes it: with underscores, with its value, with a field of it."""
    flags.check(spec(argument))


def test_flag_that_the_engine_lacks_is_refused_with_the_nearest() -> None:
    """Its start would end on a GPU with vLLM's usage."""
    with pytest.raises(RegistryError) as refused:
        flags.check(spec("--max-num-sequences=4"))
    assert refused.value.message == "Model 'mine': extra_args has '--max-num-sequences=4', which vLLM does not know."
    assert refused.value.hint.startswith("Did you mean '--max-num-seqs'?")


def test_flags_of_every_entry_are_known() -> None:
    """The built-in registry deploys."""
    for entry in Registry.load().specs.values():
        flags.check(entry)
