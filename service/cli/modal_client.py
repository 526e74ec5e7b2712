"""Imports Modal's client, which reads its configuration as it is imported, and raises where that is damaged."""

from __future__ import annotations

import contextlib
import io
import os
import re

from service.errors import ServiceError, one_line

_LINE = re.compile(r"\(line (\d+) column")


def load() -> None:
    """Import Modal's client; takes longer than most words.

    Raises:
        ServiceError: It cannot read its configuration.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints that its installation is broken
            import modal  # noqa: F401, PLC0415 - what is imported here is the matter
    except ImportError:
        raise
    except Exception as error:  # noqa: BLE001 - its parser of TOML raises many
        line = _LINE.search(str(error))  # of the file; the error's text has what stands there: it may be a token
        why = f"line {line[1]} is no TOML" if line else one_line(error)
        file = os.environ.get("MODAL_CONFIG_PATH") or "~/.modal.toml"
        raise ServiceError(
            f"Modal's configuration, '{file}' and the variables MODAL_*, cannot be read: {why}.",
            hint="Correct it, or write the file anew: modal setup.",
        ) from None
