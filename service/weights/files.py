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
class RepositorySpec:
    """What an entry needs of one repository: which commit, and which of its files.

    Attributes:
        hub_id: The repository's name on the hub.
        revision: The commit; None means the newest.
        ignore_patterns: Files that are left out in addition to the rules of this module.
        keep_patterns: Files that are kept although the rules of this module leave them out.
    """

    hub_id: str
    revision: str | None = None
    ignore_patterns: tuple[str, ...] = ()
    keep_patterns: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The repository and its commit, for messages."""
        return f"{self.hub_id} at revision {self.revision}" if self.revision else self.hub_id


def select_files(paths: Iterable[str], repository: RepositorySpec) -> list[str]:
    """Return which of a repository's files the engine reads, in their order.

    Safetensors are preferred to pickles, and `consolidated` files are left out where there are others.
    """
    allowed = [path for path in paths if not _matches(path, repository.ignore_patterns)]
    plain = [path for path in allowed if not _matches(path, NEVER)]
    tensors = [path for path in plain if _matches(path, SAFETENSORS)]
    dropped: tuple[str, ...] = CODE
    if tensors:
        dropped += PICKLED
    if any(not _matches(path, CONSOLIDATED) for path in tensors):
        dropped += CONSOLIDATED
    kept = {path for path in plain if not _matches(path, dropped)}
    return [path for path in allowed if path in kept or _matches(path, repository.keep_patterns)]


def model_repository(spec: ModelSpec) -> RepositorySpec | None:
    """Return what an entry needs of its model's repository; None for a model in a local directory."""
    if spec.hub_id is None:
        return None
    keep: tuple[str, ...] = ()
    if "--trust-remote-code" in spec.extra_args:  # only then does the engine run the repository's code
        keep += CODE
    if any("mistral" in argument for argument in spec.extra_args):  # --load-format, --config-format
        keep += CONSOLIDATED
    return RepositorySpec(spec.hub_id, spec.revision, spec.ignore_patterns, keep)


def draft_repository(spec: ModelSpec) -> RepositorySpec | None:
    """Return what an entry needs of its draft model's repository."""
    if spec.speculative is None or spec.speculative.hub_id is None:
        return None
    return RepositorySpec(spec.speculative.hub_id, spec.speculative.revision)


def repositories(spec: ModelSpec) -> list[RepositorySpec]:
    """Return all that an entry needs from the hub."""
    adapters = [RepositorySpec(adapter.hub_id, adapter.revision) for adapter in spec.adapters if adapter.hub_id]
    return [one for one in (model_repository(spec), draft_repository(spec), *adapters) if one]


def _matches(path: str, patterns: Iterable[str]) -> bool:
    """Match as `hf download` does; in addition a pattern matches a file or directory name at any depth."""
    name = path.rpartition("/")[2]
    for given in patterns:
        pattern = f"{given}*" if given.endswith("/") else given
        if fnmatchcase(path, pattern) or fnmatchcase(name, pattern) or fnmatchcase(path, f"*/{pattern}"):
            return True
    return False
