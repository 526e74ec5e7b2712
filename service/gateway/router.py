"""Finds the pool of a model name. An unknown name is refused with the nearest known ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from service.gateway.pool import Pool
from service.in_engine.vllm_service.api_error import APIError
from service.registry.gpus import Gpu
from service.registry.models import DEFAULT_ALIAS, LOCAL_SUFFIX, ModelChoice, ModelSpec, Registry

_TAG = ":latest"
_PROVIDER = re.compile(r"[A-Za-z0-9_.-]+")
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

    def replace(self, registry: Registry) -> None:
        """Take other models; requests that run keep the pool that they have."""
        self.registry, self._routes = registry, {}

    def find(self, name: str | None) -> Route:
        """Return the route of a name.

        Raises:
            APIError: 404 `model_not_found`, with the nearest names.
        """
        requested = name if name and name.strip() else DEFAULT_ALIAS
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

    def known_pools(self) -> dict[Pool, str]:
        """Return the default pools, and those on other GPUs that requests have named, with a name of each."""
        named = {route.pool: name for name, route in self._routes.items()}
        return named | {pool: pool.spec.key for pool in self.default_pools()}

    def _resolve(self, requested: str) -> Route:
        choice, local_defaults = self._choose(requested)
        spec = choice.spec
        names = (*spec.names, *(adapter.name for adapter in spec.adapters))
        adapter = next((part.name for part in spec.adapters if part.name.lower() == choice.name), None)
        pool = self._pool(spec, choice.gpu)
        return Route(pool, adapter or spec.key, is_exact_name=requested in names, local_defaults=local_defaults)

    def _choose(self, requested: str) -> tuple[ModelChoice, bool]:
        """Return model and GPU, and whether the name ended in `-local`."""
        spellings = list(_spellings(requested))
        for find in (self.registry.find, self.registry.find_pattern):
            for name in spellings:
                if choice := find(name, self.default):
                    return choice, False
                if name.lower().endswith(LOCAL_SUFFIX) and (choice := find(name[: -len(LOCAL_SUFFIX)], self.default)):
                    return choice, True
        unknown = self.registry.unknown(requested, spellings[-1])
        raise APIError(404, str(unknown), code="model_not_found", param="model")


def _spellings(requested: str) -> Iterator[str]:
    """Yield a name as it is, and without what clients add to it: blanks, Ollama's tag, the prefix of a provider.

    LiteLLM writes `hosted_vllm/tiny`, clients of OpenRouter `openai/gpt-oss-20b`, those of Ollama `tiny:latest`. The
    last one is the shortest.
    """
    name = requested.strip()
    while True:
        yield name
        if (bare := name.removesuffix(_TAG)) != name:
            yield bare
        provider, _, rest = name.partition("/")
        if not rest or not _PROVIDER.fullmatch(provider):
            return
        name = rest
