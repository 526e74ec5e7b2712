"""Adapters that an operator has loaded are kept in a file, and served again."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from service.errors import RegistryError, ServiceError
from service.local.adapter_file import AdapterFile, adapter_file, with_kept_adapters
from service.registry.models import Adapter, ModelSpec, Registry

ONE = Adapter(name="one", hub_id="org/one", revision="a" * 40)
TWO = Adapter(name="two", hub_id="org/two", revision="b" * 40)
MINE = ModelSpec(key="mine", hub_id="org/mine", max_cpu_loras=2)


def test_adapters_that_were_added_are_merged_into_their_models(tmp_path: Path) -> None:
    """After a restart too, which reads the same file; twice is as once."""
    file = AdapterFile(tmp_path / "state" / "adapters.toml")
    assert file.merge(Registry({"mine": MINE})).specs["mine"] == MINE
    file.add("mine", ONE)
    file.add("mine", TWO)
    merged = AdapterFile(file.path).merge(Registry({"mine": MINE}))
    assert merged.specs["mine"].adapters == (ONE, TWO)
    assert merged.resolve("two").spec.key == "mine"
    assert file.merge(merged).specs == merged.specs
    assert "delete its table and reload" in file.path.read_text()


def test_adapter_whose_model_or_name_has_gone_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The models file may have changed; the service starts all the same."""
    file = AdapterFile(tmp_path / "adapters.toml")
    file.add("gone", ONE)
    file.add("mine", TWO)
    taken = ModelSpec(key="other", hub_id="org/other", aliases=("two",))
    with caplog.at_level(logging.WARNING):
        merged = file.merge(Registry({"mine": MINE, "other": taken}))
    assert merged.specs["mine"].adapters == ()
    assert "Adapter 'one'" in caplog.text
    assert "Unknown model 'gone'" in caplog.text
    assert "'two' of model" in caplog.text


@pytest.mark.parametrize(
    "text", ["[", "adapters = 5", "adapters = [5]", '[[adapters]]\nname = "x"', "[[adapters]]\nmodel = 1"]
)
def test_file_that_cannot_be_read_is_an_error_with_its_name(tmp_path: Path, text: str) -> None:
    """And with the next step."""
    file = tmp_path / "adapters.toml"
    file.write_text(text)
    with pytest.raises(RegistryError, match=r"adapters\.toml.*cannot be read.* Correct it, or remove it"):
        AdapterFile(file).merge(Registry({"mine": MINE}))


def test_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    """The adapter is then refused: a restart would lose it."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ServiceError, match=r"cannot be written.* A restart would lose adapter 'one'"):
        AdapterFile(tmp_path / "file" / "adapters.toml").add("mine", ONE)


def test_adapters_of_the_services_on_all_ports_are_kept_from_a_prune(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their next start may be offline."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    adapter_file(8000).add("mine", ONE)
    adapter_file(8001).add("mine", ONE)
    adapter_file(8001).add("mine", TWO)
    assert with_kept_adapters(Registry({"mine": MINE})).specs["mine"].adapters == (ONE, TWO)
