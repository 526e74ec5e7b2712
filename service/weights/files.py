"""Which files of a repository the engine reads. Looks at names only; weights in a second format are left out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.registry.models import ModelSpec

# Weights for other programs, and what only people look at.
NEVER = (
    *("*.gguf", "*.onnx", "*.onnx_data", "*.msgpack", "*.h5", "*.ot", "*.tflite", "*.mlmodel"),
    *("onnx/*", "openvino/*", "coreml/*", "original/*", "metal/*"),
    *(".git*", "*.md", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.mp4", "*.pdf", "*.ipynb"),
)
SAFETENSORS = ("*.safetensors",)
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CONSOLIDATED = ("consolidated*",)  # Mistral's own layout of the same weights
CODE = ("*.py",)


@dataclass(frozen=True)
class Wanted:
    """One repository: which, at which commit, and what of it.

    Attributes:
        hub_id: Its name on the hub.
        revision: The commit; None: the newest.
        ignore_patterns: Files that are left out besides.
        keep_patterns: Files that are kept although the rules here leave them out.
    """

    hub_id: str
    revision: str | None = None
    ignore_patterns: tuple[str, ...] = ()
    keep_patterns: tuple[str, ...] = ()

    @property
    def at(self) -> str:
        """The repository and its commit, for sentences."""
        return f"{self.hub_id} at revision {self.revision}" if self.revision else self.hub_id


def chosen(paths: Iterable[str], wanted: Wanted) -> list[str]:
    """Return which of a repository's files the engine reads, in their order.

    Safetensors go before pickles, and `consolidated` files are left out where others are.
    """
    asked_for = [path for path in paths if not _any(path, wanted.ignore_patterns)]
    plain = [path for path in asked_for if not _any(path, NEVER)]
    tensors = [path for path in plain if _any(path, SAFETENSORS)]
    dropped: tuple[str, ...] = CODE
    if tensors:
        dropped += PICKLED
    if any(not _any(path, CONSOLIDATED) for path in tensors):
        dropped += CONSOLIDATED
    kept = {path for path in plain if not _any(path, dropped)}
    return [path for path in asked_for if path in kept or _any(path, wanted.keep_patterns)]


def model_of(spec: ModelSpec) -> Wanted | None:
    """Return what an entry needs of its model's repository; None for a model that lies in a directory."""
    if spec.hub_id is None:
        return None
    keep: tuple[str, ...] = ()
    if "--trust-remote-code" in spec.extra_args:  # only then does the engine run the repository's code
        keep += CODE
    if any("mistral" in argument for argument in spec.extra_args):  # --load-format, --config-format
        keep += CONSOLIDATED
    return Wanted(spec.hub_id, spec.revision, spec.ignore_patterns, keep)


def draft_of(spec: ModelSpec) -> Wanted | None:
    """Return what an entry needs of its draft model's repository."""
    if spec.speculative is None or spec.speculative.hub_id is None:
        return None
    return Wanted(spec.speculative.hub_id, spec.speculative.revision)


def repositories_of(spec: ModelSpec) -> list[Wanted]:
    """Return all that an entry needs from the hub."""
    adapters = [Wanted(adapter.hub_id, adapter.revision) for adapter in spec.adapters if adapter.hub_id]
    return [wanted for wanted in (model_of(spec), draft_of(spec), *adapters) if wanted]


def _any(path: str, patterns: Iterable[str]) -> bool:
    """Match as `hf download` does, and a name or a directory at any depth besides."""
    name = path.rpartition("/")[2]
    for given in patterns:
        pattern = f"{given}*" if given.endswith("/") else given
        if fnmatchcase(path, pattern) or fnmatchcase(name, pattern) or fnmatchcase(path, f"*/{pattern}"):
            return True
    return False
