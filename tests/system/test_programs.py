"""Programs that are missing are named, with the package that has them."""

from __future__ import annotations

import pytest

from . import programs


def test_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The failure of a test says what to install."""
    monkeypatch.setattr(programs, "_PATH", "")

    with pytest.raises(programs.MissingProgramError, match="nginx is not installed: sudo apt-get install nginx-light"):
        programs.find("nginx")


def test_missing_packages_are_those_of_missing_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """CI installs them, and none where nothing is missing."""
    assert programs.missing_packages() == []

    monkeypatch.setattr(programs, "_PATH", "")

    assert programs.missing_packages() == list(programs.PACKAGES.values())
