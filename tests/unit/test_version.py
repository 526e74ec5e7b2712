"""The version: in the package, of the distribution, at the command line, and in the changelog."""

from __future__ import annotations

import json
import re
import tomllib

from typer.testing import CliRunner

import service
from service.cli.main import app
from service.gateway import openapi
from tests.engine.running import REPOSITORY


def test_version_is_the_packages_own_everywhere() -> None:
    """Pyproject reads it there; the command and the API's document have it."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "service.__version__"}
    assert CliRunner().invoke(app, ["--version"]).output == f"vllm-service {service.__version__}\n"
    assert json.loads(openapi.document())["info"]["version"] == service.__version__


def test_changelog_begins_with_this_version() -> None:
    """As Keep a Changelog has it: newest first, each with its date, changes under the six headings alone."""
    text = (REPOSITORY / "CHANGELOG.md").read_text()
    (newest, *_) = versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", text, re.M)
    assert newest == service.__version__
    assert len(versions) == len(re.findall(r"^## (?!\[Unreleased\])", text, re.M))
    kinds = set(re.findall(r"^### (.*)$", text, re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
