"""A directory with a model or an adapter, as `save_pretrained` writes it: which files are served, and what is wrong.

Nothing but headers is read. Weights are safetensors alone; pickles beside them, code, hidden files and what a training
run leaves are left out.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from service.errors import UsageError, WeightsError
from service.weights import adapters
from service.weights.files import RepositorySpec, check_safetensors, select_files
from service.weights.safetensors_header import read_header

_TRAINING = ("checkpoint-*", "global_step*", "runs", "wandb", "logs", "__pycache__", ".*")  # directories
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model")
_INDEX = "model.safetensors.index.json"
_CONFIG, _ADAPTER = "config.json", adapters.CONFIG
_AGAIN = "Save or download it again."


@dataclass(frozen=True)
class ModelDirectory:
    """What of a directory is served.

    Attributes:
        path: The directory.
        files: Size in bytes of each file, by its path inside.
        left_out: What else is there.
        lora_rank: The largest rank of an adapter's modules; None: it is a model.
    """

    path: Path
    files: dict[str, int]
    left_out: tuple[str, ...]
    lora_rank: int | None = None

    @property
    def is_adapter(self) -> bool:
        """Whether it is a LoRA adapter."""
        return self.lora_rank is not None

    @property
    def weights_gb(self) -> float:
        """Size of what the engine reads as weights, in 10^9 bytes."""
        return sum(size for path, size in self.files.items() if path.endswith(".safetensors")) / 1e9


def read(directory: Path) -> ModelDirectory:
    """Check a directory and return what of it is served.

    Raises:
        UsageError: It is no model or adapter, is incomplete, or has what is not served.
    """
    if not directory.is_dir():
        raise UsageError(f"'{directory}' is no directory.", hint="Give one that save_pretrained has written.")
    found, left_out = _list(directory)
    names = set(found)
    is_adapter = _ADAPTER in names and not any(fnmatchcase(name, "model*.safetensors") for name in names)
    config = _ADAPTER if is_adapter else _CONFIG
    if config not in names:
        raise UsageError(
            f"'{directory}' has neither {_CONFIG} nor {_ADAPTER}.",
            hint="Give the directory itself that save_pretrained has written: it has one of them.",
        )
    try:
        check_safetensors(names, f"'{directory}'")
    except WeightsError as error:
        raise UsageError(
            error.message, hint="Save it again: model.save_pretrained(DIR, safe_serialization=True)."
        ) from error
    chosen = select_files(sorted(names), RepositorySpec(str(directory)))
    table = _table(directory / config)
    kept = ModelDirectory(
        directory,
        {name: _size(directory, name) for name in chosen},
        tuple(sorted([*left_out, *(names - set(chosen))])),
        _rank(directory / config, table) if is_adapter else None,
    )
    if not (is_adapter or names & set(_TOKENIZERS) or any(name.endswith(".tiktoken") for name in names)):
        raise UsageError(
            f"'{directory}' has no tokenizer: none of {', '.join(_TOKENIZERS)}.",
            hint="Save it there too: tokenizer.save_pretrained(DIR). A model that was trained keeps its base's.",
        )
    _check_weights(kept)
    return kept


def _rank(file: Path, config: dict[str, Any]) -> int:
    rank = adapters.rank_of(config)
    if rank is None:
        raise UsageError(f"'{file}' has no rank: r is {config.get('r')!r}.", hint=_AGAIN)
    if adapters.least_limit(rank) is None:
        raise UsageError(
            f"'{file}' has rank {rank}, and vLLM serves adapters up to rank {adapters.RANKS[-1]}.",
            hint="Train it with a smaller r.",
        )
    return rank


def _list(directory: Path) -> tuple[list[str], list[str]]:
    """Return the files, and what is left out by the name of its directory or as a link to one."""
    found: list[str] = []
    left_out: list[str] = []
    for place, folders, files in os.walk(directory, onerror=_raise):
        inside = Path(place).relative_to(directory)
        for folder in list(folders):
            if any(fnmatchcase(folder, pattern) for pattern in _TRAINING):
                folders.remove(folder)
                left_out.append(f"{inside / folder}/")
            elif (directory / inside / folder).is_symlink():
                _check_link(directory, str(inside / folder))
                left_out.append(f"{inside / folder}/")
        for file in files:
            (left_out if file.startswith(".") else found).append(str(inside / file))
    return found, left_out


def _raise(error: OSError) -> None:
    raise error


def _size(directory: Path, name: str) -> int:
    """Return a file's size, and insist that it is a file of this directory whose name others can read."""
    _check_link(directory, name)
    if not (directory / name).is_file():
        raise UsageError(f"'{directory / name}' is no file.", hint=_AGAIN)
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"'{directory}' has a file whose name is not UTF-8: {name!r}.", hint="Rename it.") from error
    return (directory / name).stat().st_size


def _check_link(directory: Path, name: str) -> None:
    """Refuse a link that leads out of the directory: what is there may be anything, and may change."""
    target = (directory / name).resolve()
    if not target.is_relative_to(directory.resolve()):
        raise UsageError(
            f"'{directory / name}' is a link to '{target}', outside of the directory.",
            hint=f"Copy the directory with its links' contents, and give the copy: cp -rL {directory} COPY",
        )


def _check_weights(found: ModelDirectory) -> None:
    """Insist on all shards, each whole."""
    directory, tensors = found.path, [name for name in found.files if name.endswith(".safetensors")]
    if not tensors:
        raise UsageError(f"'{directory}' has no weights: no *.safetensors.", hint=_AGAIN)
    if _INDEX in found.files:
        index = _table(directory / _INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise UsageError(f"'{directory / _INDEX}' has no table weight_map: it was not written whole.", hint=_AGAIN)
        if missing := sorted(set(map(str, index.values())) - found.files.keys()):
            raise UsageError(f"'{directory}' lacks {', '.join(missing)}, which {_INDEX} names.", hint=_AGAIN)
    elif shards := [name for name in tensors if "-of-" in name and "/" not in name]:
        raise UsageError(f"'{directory}' has the shard {shards[0]}, but no {_INDEX}.", hint=_AGAIN)
    for name in tensors:
        header = read_header(directory / name)
        if header is None or header.whole_size != found.files[name]:
            what = f"its header tells of {header.whole_size} bytes" if header else "it has no header"
            raise UsageError(
                f"'{directory / name}' was not written whole: it has {found.files[name]} bytes, and {what}.",
                hint=_AGAIN,
            )


def _table(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise UsageError(f"'{file}' is no JSON: {error}.", hint=_AGAIN) from error
    if not isinstance(value, dict):
        raise UsageError(f"'{file}' holds no table.", hint=_AGAIN)
    return value
