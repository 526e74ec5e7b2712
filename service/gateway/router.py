"""Finds the pool of a model name. An unknown name is refused with the nearest known ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from service.errors import UnknownModelError
from service.gateway.api_errors import APIError
from service.gateway.pool import Pool
from service.registry.gpus import Gpu
from service.registry.models import DEFAULT_ALIAS, ModelChoice, ModelSpec, Registry

LOCAL_SUFFIX = "-local"
_REMEMBERED = 4096  # names, in all the ways to write them


@dataclass(frozen=True)
class Route:
    """Where the requests for a model name go.

    Attributes:
        pool: The pool that serves them.
        name: The model or adapter name that the engine is sent.
        is_exact_name: The engine knows the requested name as it is.
        local_defaults: The name ended in `-local`: requests with tools get its defaults.
    """

    pool: Pool
    name: str
    is_exact_name: bool
    local_defaults: bool


class ModelRouter:
    """The routes of all model names.

    Args:
        registry: The models.
        default: Name of the model that requests for `llm`, or without a name, get.
        pool: Returns the pool of a model on a GPU, None for the entry's own; the same one for the same arguments.
    """

    def __init__(self, registry: Registry, default: str, pool: Callable[[ModelSpec, Gpu | None], Pool]) -> None:
        self.registry, self.default = registry, default
        self._pool = pool
        self._routes: dict[str, Route] = {}

    def find(self, name: str | None) -> Route:
        """Return the route of a name.

        Raises:
            APIError: 404 `model_not_found`, with the nearest names.
        """
        requested = name or DEFAULT_ALIAS
        if (route := self._routes.get(requested)) is None:
            route = self._resolve(requested)
            if len(self._routes) < _REMEMBERED:
                self._routes[requested] = route
        return route

    def default_pools(self) -> Sequence[Pool]:
        """Return the pool of each model's name without a GPU, the default model's first."""
        pools = [self._pool(spec, None) for spec in self.registry.specs.values()]
        default = self.find(None).pool
        return [default, *(pool for pool in pools if pool is not default)]

    def _resolve(self, requested: str) -> Route:
        choice, bare = self._choose(requested)
        spec = choice.spec
        names = (*spec.names, *(adapter.name for adapter in spec.adapters))
        adapter = next((part.name for part in spec.adapters if part.name.lower() == choice.name), None)
        pool = self._pool(spec, choice.gpu)
        return Route(pool, adapter or spec.key, is_exact_name=requested in names, local_defaults=bare != requested)

    def _choose(self, requested: str) -> tuple[ModelChoice, str]:
        """Return model and GPU, and the name without `-local`."""
        try:
            return self.registry.resolve(requested, self.default), requested
        except UnknownModelError as error:
            bare = requested[: -len(LOCAL_SUFFIX)] if requested.lower().endswith(LOCAL_SUFFIX) else ""
            try:
                if bare:
                    return self.registry.resolve(bare, self.default), bare
            except UnknownModelError:
                pass
            raise APIError(404, str(error), kind="not_found_error", code="model_not_found", param="model") from error
