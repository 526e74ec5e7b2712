"""Which files of a repository the engine reads. Looks at names only; weights in a second format are left out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from service.errors import WeightsError
from service.registry import extra_args
from service.registry.entries import UPLOADS

if TYPE_CHECKING:
    from service.registry.models import Adapter, ModelSpec

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
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_OTHERS = (*PICKLED, "*.gguf")
_PART = "pytorch_model.bin"  # of a sentence transformer


@dataclass(frozen=True)
class RepositorySpec:
    """What an entry needs of one repository: which commit, and which of its files.

    Attributes:
        hub_id: The repository's name on the hub.
        revision: The commit; None means the newest.
        ignore_patterns: Files that are left out in addition to the rules of this module.
        keep_patterns: Files that are kept although the rules of this module leave them out.
        is_adapter: It is a LoRA adapter, of which nothing else is read.
    """

    hub_id: str
    revision: str | None = None
    ignore_patterns: tuple[str, ...] = ()
    keep_patterns: tuple[str, ...] = ()
    is_adapter: bool = False

    @property
    def label(self) -> str:
        """The repository and its commit, for messages."""
        name = label(self.hub_id)
        return f"{name} at revision {self.revision}" if self.revision else name


def is_upload(hub_id: str) -> bool:
    """Tell whether this is what `vllm-service upload` put on the volume, rather than a repository of a hub."""
    return hub_id.startswith(f"{UPLOADS}:")


def label(hub_id: str) -> str:
    """Return a repository's or an upload's name for messages."""
    return f"upload '{hub_id.partition(':')[2]}'" if is_upload(hub_id) else hub_id


def select_files(paths: Iterable[str], repository: RepositorySpec) -> list[str]:
    """Return which of a repository's files the engine reads, in their order.

    Pickles are left out, which may hold code, and `consolidated` files where there are other safetensors.
    """
    if repository.is_adapter:
        return [path for path in paths if path in ADAPTER_FILES]
    allowed = [path for path in paths if not _matches(path, repository.ignore_patterns)]
    plain = [path for path in allowed if not _matches(path, NEVER)]
    tensors = [path for path in plain if _matches(path, SAFETENSORS)]
    dropped: tuple[str, ...] = CODE + PICKLED
    if any(not _matches(path, CONSOLIDATED) for path in tensors):
        dropped += CONSOLIDATED
    kept = {path for path in plain if not _matches(path, dropped)}
    return [path for path in allowed if path in kept or _matches(path, repository.keep_patterns)]


def check_safetensors(paths: Iterable[str], label: str) -> None:
    """Refuse a model or an adapter whose weights would be read from pickles: vLLM does that where it finds no other.

    Args:
        paths: The files of its repository or directory.
        label: What it is, which begins the sentence.

    Raises:
        WeightsError: It has pickles alone, or a part of it has.
    """
    names = set(paths)
    top = [name for name in names if "/" not in name]
    tensors, others = ([name for name in top if _matches(name, kind)] for kind in (SAFETENSORS, _OTHERS))
    if ADAPTER_FILES[0] in names:
        tensors = [name for name in tensors if name.startswith("adapter_model.")]
    parts = (
        [name.removesuffix(_PART) for name in names if name.endswith(f"/{_PART}")] if "modules.json" in names else []
    )
    if (others and not tensors) or any(f"{part}model.safetensors" not in names for part in parts):
        raise WeightsError(
            f"{label} has weights that are not in the safetensors format. Pickles, which may hold code, and GGUF are "
            "not served.",
            hint="Name a repository with safetensors, or convert it: https://huggingface.co/docs/safetensors.",
        )


def check_adapter(paths: Iterable[str], label: str) -> None:
    """Refuse a repository that is no LoRA adapter, or has one of pickles.

    Args:
        paths: Its files.
        label: What it is, which begins the sentence.

    Raises:
        WeightsError: It lacks a file that every adapter has.
    """
    names = set(paths)
    check_safetensors(names, label)
    if missing := [name for name in ADAPTER_FILES if name not in names]:
        raise WeightsError(
            f"{label} is no LoRA adapter: it has no {' and no '.join(missing)}.",
            hint="Name a repository that PEFT's save_pretrained has written.",
        )


def model_repository(spec: ModelSpec) -> RepositorySpec | None:
    """Return what an entry needs of its model's repository or upload; None for a model in a local directory."""
    if spec.repository is None:
        return None
    keep: tuple[str, ...] = ()
    if extra_args.trusts_code(spec.extra_args):  # only then does the engine run the repository's code
        keep += CODE
    if any("mistral" in argument for argument in spec.extra_args):  # --load-format, --config-format
        keep += CONSOLIDATED
    return RepositorySpec(spec.repository, spec.revision, spec.ignore_patterns, keep)


def draft_repository(spec: ModelSpec) -> RepositorySpec | None:
    """Return what an entry needs of its draft model's repository."""
    if spec.speculative is None or spec.speculative.hub_id is None:
        return None
    return RepositorySpec(spec.speculative.hub_id, spec.speculative.revision)


def repositories(spec: ModelSpec) -> list[RepositorySpec]:
    """Return all that an entry needs from the hub and of uploads."""
    adapters = map(adapter_repository, spec.adapters)
    return [one for one in (model_repository(spec), draft_repository(spec), *adapters) if one]


def adapter_repository(adapter: Adapter) -> RepositorySpec | None:
    """Return what an adapter needs of its repository or upload; None for one in a local directory."""
    return RepositorySpec(adapter.repository, adapter.revision, is_adapter=True) if adapter.repository else None


def _matches(path: str, patterns: Iterable[str]) -> bool:
    """Match as `hf download` does; in addition a pattern matches a file or directory name at any depth."""
    name = path.rpartition("/")[2]
    for given in patterns:
        pattern = f"{given}*" if given.endswith("/") else given
        if fnmatchcase(path, pattern) or fnmatchcase(name, pattern) or fnmatchcase(path, f"*/{pattern}"):
            return True
    return False
