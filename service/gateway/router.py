"""Which pool a name stands for. Refused: names that nothing answers to, with the nearest ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from service.errors import UnknownModelError
from service.gateway.api_errors import Refusal
from service.gateway.pool import Pool
from service.registry.gpus import Gpu
from service.registry.models import DEFAULT_ALIAS, ModelChoice, ModelSpec, Registry

LOCAL_SUFFIX = "-local"
_REMEMBERED = 4096  # names, in all the ways to write them


@dataclass(frozen=True)
class Target:
    """What a name stands for.

    Attributes:
        pool: Where its requests go.
        name: What the engine is to be told.
        known: The engine knows the very name that was asked for.
        tuned: The name ended in `-local`: defaults for tools are filled in.
    """

    pool: Pool
    name: str
    known: bool
    tuned: bool


class Directory:
    """All names of all models.

    Args:
        registry: The models.
        default: Name of the model that `llm`, or no name, stands for.
        pool: Returns the pool of a model on a GPU, None for the entry's own; always the same one for the same two.
    """

    def __init__(self, registry: Registry, default: str, pool: Callable[[ModelSpec, Gpu | None], Pool]) -> None:
        self.registry, self.default = registry, default
        self._pool = pool
        self._found: dict[str, Target] = {}

    def find(self, name: str | None) -> Target:
        """Return what a name stands for.

        Raises:
            Refusal: 404 `model_not_found`, with the nearest names.
        """
        asked = name or DEFAULT_ALIAS
        if (target := self._found.get(asked)) is None:
            target = self._look_up(asked)
            if len(self._found) < _REMEMBERED:
                self._found[asked] = target
        return target

    def own(self) -> Sequence[Pool]:
        """Return the pool that each model's bare name means, the default model's first."""
        pools = [self._pool(spec, None) for spec in self.registry.specs.values()]
        default = self.find(None).pool
        return [default, *(pool for pool in pools if pool is not default)]

    def _look_up(self, asked: str) -> Target:
        choice, bare = self._choose(asked)
        spec = choice.spec
        names = (*spec.names, *(adapter.name for adapter in spec.adapters))
        adapter = next((part.name for part in spec.adapters if part.name.lower() == choice.name), None)
        pool = self._pool(spec, choice.gpu)
        return Target(pool, adapter or spec.key, known=asked in names, tuned=bare != asked)

    def _choose(self, asked: str) -> tuple[ModelChoice, str]:
        """Return model and GPU, and the name less `-local`."""
        try:
            return self.registry.resolve(asked, self.default), asked
        except UnknownModelError as error:
            bare = asked[: -len(LOCAL_SUFFIX)] if asked.lower().endswith(LOCAL_SUFFIX) else ""
            try:
                if bare:
                    return self.registry.resolve(bare, self.default), bare
            except UnknownModelError:
                pass
            raise Refusal(404, str(error), kind="not_found_error", code="model_not_found", param="model") from error
