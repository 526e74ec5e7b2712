"""What keys and limits there are: those of the environment, and those that `vllm-service keys` made, by now."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pydantic import ValidationError

from service.errors import ServiceError, UnknownModelError, UsageError, did_you_mean
from service.registry.models import Registry
from service.usage.key_records import KeyStore
from service.usage.limits import KeyLimits
from service.validation import explain

OPERATORS = ("default", "admin")  # the name of API_KEY's key, and of the one that a deploy makes
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeySet:
    """All keys, as digests, and the limits of their clients.

    Attributes:
        digests: SHA-256 in hexadecimal -> name of the client, of the keys in the environment.
        limits: By name.
        models: Keys of the models that a client may use, by name; those that are missing may use all.
        stored: Likewise as `digests`, of the keys that `vllm-service keys` made, with the time at which each ends.
        identities: By name, of these clients: another one for a name that was revoked and made again.
        is_complete: Whether the stored ones could be read; else a key that is not here may be valid all the same.
    """

    digests: Mapping[str, str]
    limits: Mapping[str, KeyLimits] = field(default_factory=dict)
    models: Mapping[str, frozenset[str]] = field(default_factory=dict)
    stored: Mapping[str, tuple[str, float | None]] = field(default_factory=dict)
    identities: Mapping[str, str] = field(default_factory=dict)
    is_complete: bool = True

    @property
    def names(self) -> set[str]:
        """The names of all clients."""
        return {*self.digests.values(), *(name for name, _ in self.stored.values())}


class KeySource:
    """Reads them.

    Args:
        environ: Has `API_LIMITS`.
        digests: Of the keys in the environment, as `keys.digests` returns them.
        store: Has the others; None: there are none.
        default: Name of the model that `llm` means.

    Raises:
        UsageError: A variable is wrong.
    """

    def __init__(
        self, environ: Mapping[str, str], digests: Mapping[str, str], store: KeyStore | None, default: str
    ) -> None:
        self.digests = digests
        self.limits = load_limits(environ, self.digests.values())
        self.store, self._default = store, default

    def load(self, registry: Registry, *, with_store: bool = True) -> KeySet:
        """Return what there is now. Blocks.

        Raises:
            UsageError: `API_LIMITS` names a model that the registry does not have.
            ServiceError: The store cannot be read.
        """
        limits = dict(self.limits)
        models = {
            name: frozenset(self._model(f"API_LIMITS of '{name}'", model, registry) for model in one.models)
            for name, one in limits.items()
            if one.models is not None
        }
        stored: dict[str, tuple[str, float | None]] = {}
        identities: dict[str, str] = {}
        for record in self.store.load().values() if self.store and with_store else ():
            stored |= {key.digest: (record.name, key.ends_at) for key in record.keys}
            if record.name not in self.digests.values():
                identities[record.name] = record.identity
                limits[record.name] = record.limits
                if record.limits.models is not None:
                    models[record.name] = self._known(record.name, record.limits.models, registry)
        return KeySet(self.digests, limits, models, stored, identities, is_complete=with_store)

    def load_at_start(self, registry: Registry) -> KeySet:
        """Return what there is; a store that cannot be read stops a service only where no key is in the environment.

        Raises:
            ServiceError: It cannot be read, and without its keys every request would be let in.
        """
        try:
            return self.load(registry)
        except ServiceError as error:
            if not self.digests:
                raise
            found = self.load(registry, with_store=False)
            _log.warning("The keys that 'vllm-service keys' made are 503 until they can be read: %s", error)
            return found

    def check_models(self, limits: KeyLimits, registry: Registry) -> None:
        """Refuse limits that name a model which the registry does not have.

        Raises:
            UsageError: They do.
        """
        for model in limits.models or ():
            self._model("models", model, registry)

    def _known(self, name: str, models: Iterable[str], registry: Registry) -> frozenset[str]:
        """Return those of the models that there are: one that is gone must not end the keys of all others."""
        found: set[str] = set()
        for model in models:
            try:
                found.add(self._model(f"The key '{name}'", model, registry))
            except UsageError as error:
                _log.warning("%s", error)
        return frozenset(found)

    def _model(self, where: str, model: str, registry: Registry) -> str:
        try:
            choice = registry.resolve(model, self._default)
        except UnknownModelError as error:
            raise UsageError(f"{where}: {error.message}", hint=error.hint) from error
        if choice.gpu:
            raise UsageError(
                f"{where} lists '{model}', a model on one GPU; expected a model, allowed on every GPU.",
                hint=f"Write '{choice.spec.key}'.",
            )
        return choice.spec.key


def load_limits(environ: Mapping[str, str], names: Iterable[str]) -> dict[str, KeyLimits]:
    """Read `API_LIMITS`: a JSON object, name of a key -> its limits. The operator's key is an admin if it is not in it.

    Raises:
        UsageError: It is no such object, or names a key that does not exist.
    """
    known = set(names)
    found = {name: KeyLimits(admin=True) for name in OPERATORS if name in known}
    text = environ.get("API_LIMITS", "").strip()
    if not text:
        return found
    try:
        table = json.loads(text)
        given = {name: KeyLimits.model_validate(limits) for name, limits in table.items()}
    except ValidationError as error:
        raise UsageError(
            f"API_LIMITS: {' '.join(explain(error, KeyLimits))}", hint=f"Fields: {', '.join(KeyLimits.model_fields)}."
        ) from error
    except (ValueError, AttributeError) as error:
        raise UsageError(
            "API_LIMITS is not a JSON object of limits by name.",
            hint='Write one such as {"alice": {"models": ["qwen3-8b"], "requests_per_minute": 60, "concurrency": 4}}.',
        ) from error
    for name in given:
        if name not in known:
            keys_known = f"Keys: {', '.join(sorted(known)) or 'none'} (API_KEY is 'default')."
            raise UsageError(
                f"API_LIMITS has limits for '{name}', and no key has that name.{did_you_mean(name, known)}",
                hint=keys_known,
            )
    return found | given
