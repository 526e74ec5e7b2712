"""A LoRA adapter, as PEFT saves it: whether it is whole, its rank, and whether it fits the model that it is for.

vLLM compares the rank when it loads the adapter, which is at the end of a boot on a GPU. It compares no shapes: an
adapter of a smaller model would be served, with wrong answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from service.errors import WeightsError
from service.registry.models import ModelSpec
from service.weights.adapter_features import why_unsupported
from service.weights.files import ADAPTER_FILES
from service.weights.safetensors_header import SafetensorsHeader, read_header

CONFIG, WEIGHTS = ADAPTER_FILES
DEFAULT: int = ModelSpec.model_fields["max_lora_rank"].default
RANKS: tuple[int, ...] = get_args(ModelSpec.model_fields["max_lora_rank"].annotation)
_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<part>[AB])\.(?:default\.)?weight")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_AGAIN = "Save or download it again."
_PLAIN = "Train a plain LoRA adapter, or convert it to one with PEFT."


def rank_of(config: dict[str, Any]) -> int | None:
    """Return the largest rank of an adapter's modules; None: its configuration tells none."""
    pattern = config.get("rank_pattern")
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    return max((rank for rank in ranks if isinstance(rank, int) and rank > 0), default=None)


def check_directory(directory: Path, name: str, spec: ModelSpec, base: Path | None = None) -> None:
    """Refuse an adapter that the engine of a model could not serve.

    What it changes of the model is compared where the model's weights have the same names and are not packed.

    Args:
        directory: Of the adapter.
        name: By which it is served.
        spec: The model's entry.
        base: Directory of the model; None: it is not here yet.

    Raises:
        WeightsError: It is no LoRA adapter, is damaged, has too large a rank, or is for another model.
    """
    what = f"Adapter '{name}'"
    config = _config(directory / CONFIG, what)
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise WeightsError(f"{what} is of PEFT's type {kind!r}, and vLLM serves LORA.", hint="Train a LoRA adapter.")
    rank = rank_of(config)
    if rank is None:
        raise WeightsError(f"{what} has no rank: r is {config.get('r')!r} in its {CONFIG}.", hint=_AGAIN)
    if unsupported := why_unsupported(config):
        raise WeightsError(f"{what} is none that vLLM serves: in its {CONFIG} {unsupported}.", hint=_PLAIN)
    check_rank(rank, what, spec)
    header = _header(directory / WEIGHTS, what)
    if wrong := next(_misfits(header.shapes, _shapes(base), spec), None):
        trained = config.get("base_model_name_or_path")
        told = f" Its {CONFIG} names the model {trained!r}." if isinstance(trained, str) and trained else ""
        raise WeightsError(
            f"{what} does not fit model '{spec.key}': {wrong}.{told}",
            hint=f"Name an adapter that was trained on {spec.hub_id or spec.key}.",
        )


def check_rank(rank: int, what: str, spec: ModelSpec) -> None:
    """Refuse a rank above what an entry says.

    Args:
        rank: Of the adapter.
        what: Begins the sentence.
        spec: The entry.

    Raises:
        WeightsError: The engine would end its boot with that.
    """
    if rank > spec.max_lora_rank:
        limit = least_limit(rank) or RANKS[-1]
        raise WeightsError(
            f"{what} has rank {rank}, and model '{spec.key}' serves adapters up to rank {spec.max_lora_rank}.",
            hint=f"Write max_lora_rank = {limit} into the entry of '{spec.key}'; memory is set aside for it.",
        )


def least_limit(rank: int) -> int | None:
    """Return the least `max_lora_rank` for a rank; None: vLLM serves none so large."""
    return next((limit for limit in RANKS if limit >= rank), None)


def _config(file: Path, what: str) -> dict[str, Any]:
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no JSON"
        raise WeightsError(
            f"{what} has no {CONFIG} that can be read in '{file.parent}': {reason}.",
            hint="Give what PEFT's save_pretrained has written.",
        ) from error
    if not isinstance(config, dict):
        raise WeightsError(f"{what} has a {CONFIG} that holds no table in '{file.parent}'.", hint=_AGAIN)
    return config


def _header(file: Path, what: str) -> SafetensorsHeader:
    try:
        header, size = read_header(file), file.stat().st_size
    except OSError as error:
        raise WeightsError(
            f"{what} has no {WEIGHTS} that can be read in '{file.parent}': {error.strerror}.",
            hint="Save it as safetensors; pickles are not served.",
        ) from error
    if header is None:
        raise WeightsError(f"{what} has a {WEIGHTS} that is not in the safetensors format.", hint=_AGAIN)
    if header.whole_size != size:
        raise WeightsError(
            f"{what} has a {WEIGHTS} that was not written whole: it has {size} bytes, and its header tells of "
            f"{header.whole_size}.",
            hint=_AGAIN,
        )
    return header


def _shapes(base: Path | None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's tensors by their names; a file that cannot be read is the engine's to judge."""
    found: dict[str, tuple[int, ...]] = {}
    for file in base.glob("*.safetensors") if base else ():
        if header := read_header(file):
            found |= header.shapes
    return found


def _misfits(tensors: dict[str, tuple[int, ...]], base: dict[str, tuple[int, ...]], spec: ModelSpec) -> Iterator[str]:
    """Yield what of an adapter's tensors is wrong. A is rank x inputs, B outputs x rank; a weight outputs x inputs."""
    alike = {_NUMBER.sub("N", name) for name in base}
    for name, shape in tensors.items():
        found = _TENSOR.fullmatch(name)
        if found is None or len(shape) != 2:  # of an embedding, or of the experts of a layer
            continue
        module, part = found["module"], found["part"]
        rank, width = shape if part == "A" else shape[::-1]
        if rank > spec.max_lora_rank:
            yield f"{name} has rank {rank}, and it serves adapters up to rank {spec.max_lora_rank}"
        weight = base.get(f"{module}.weight")
        if weight is None:
            if _NUMBER.sub("N", f"{module}.weight") in alike:
                yield f"it changes {module}, which the model does not have"
        elif len(weight) == 2 and width != (expected := weight[1 if part == "A" else 0]):
            yield f"{name} is {shape[0]} x {shape[1]}, and the model's {module} has {expected} where it has {width}"
