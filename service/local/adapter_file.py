"""The adapters that `POST /admin/adapters` has loaded, in a file: a restart serves them again."""

from __future__ import annotations

import logging
import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from service.boots import records
from service.errors import RegistryError, ServiceError, UnknownModelError
from service.files import atomic_write
from service.registry.entries import Adapter, with_adapter
from service.registry.models import Registry
from service.validation import explain

_log = logging.getLogger(__name__)
_HEAD = """\
# The adapters that POST /admin/adapters has loaded, beside those of the models file.
# To remove one, delete its table and reload (POST /admin/reload).
"""


class AdapterFile:
    """That file.

    Args:
        path: Where it is; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def merge(self, registry: Registry) -> Registry:
        """Return the models with these adapters; one whose model or name is no longer free is left out with a warning.

        Raises:
            RegistryError: The file cannot be read.
        """
        for key, adapter in self._read():
            try:
                spec = registry.resolve(key).spec
                if adapter not in spec.adapters:
                    registry = registry.replace({**registry.specs, spec.key: with_adapter(spec, adapter)})
            except (RegistryError, UnknownModelError) as error:
                _log.warning("Adapter '%s' of '%s' is not served: %s", adapter.name, self.path, error)
        return registry

    def add(self, key: str, adapter: Adapter) -> None:
        """Keep an adapter of a model.

        Raises:
            ServiceError: The file cannot be written.
        """
        kept = [*self._read(), (key, adapter)]
        try:
            atomic_write(self.path, (_HEAD + "".join(_table(model, one) for model, one in kept)).encode())
        except OSError as error:
            raise ServiceError(
                f"'{self.path}' cannot be written: {error.strerror}. A restart would lose adapter '{adapter.name}'.",
                hint="Free some space, or make its directory writable.",
            ) from error

    def _read(self) -> list[tuple[str, Adapter]]:
        try:
            tables: Any = tomllib.loads(self.path.read_text()).get("adapters", [])
            return [(str(table.pop("model")), Adapter.model_validate(table)) for table in tables]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            reason = " ".join(explain(error, Adapter)) if isinstance(error, ValidationError) else f"{error!r}."
            raise RegistryError(
                f"'{self.path}', which keeps the adapters that were loaded, cannot be read: {reason}",
                hint="Correct it, or remove it.",
            ) from error


def adapter_file(port: int) -> AdapterFile:
    """Return the file of the service on a port."""
    return AdapterFile(records.state_directory() / f"adapters-{port}.toml")


def with_kept_adapters(registry: Registry) -> Registry:
    """Return the models with the adapters of the services on all ports, whose files are not to be pruned."""
    for path in sorted(records.state_directory().glob("adapters-*.toml")):
        registry = AdapterFile(path).merge(registry)
    return registry


def _table(key: str, adapter: Adapter) -> str:
    """Return an adapter as TOML; no pattern of these values has a character that TOML escapes."""
    fields = {"model": key, "name": adapter.name, "hub_id": adapter.hub_id, "revision": adapter.revision}
    return "\n[[adapters]]\n" + "".join(f'{name} = "{value}"\n' for name, value in fields.items())
