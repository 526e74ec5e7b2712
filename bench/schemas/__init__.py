"""Schemas as people write them: 43 models of pydantic, and the shapes of the JSON Schema test suite.

`draft2020-12.json` has each schema of the suite's tests of draft 2020-12 once, with its name; from the source package
of `jsonschema` 4.26.0, which carries the suite (MIT: `LICENSE-draft2020-12`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def suite() -> dict[str, Any]:
    """Return name -> schema of the JSON Schema test suite."""
    return dict(json.loads(Path(__file__).with_name("draft2020-12.json").read_text()))
