"""`vllm-service models` as a table and as JSON."""

from __future__ import annotations

import json

import pytest

from service.cli.models import print_models
from service.errors import UnknownModelError
from service.registry.models import ModelSpec, Registry

REGISTRY = Registry.load()
Capture = pytest.CaptureFixture[str]


def test_models_as_json_are_one_object_each(capsys: Capture) -> None:
    """Every entry, with GPU, price, context, parsers, and whether it is gated."""
    print_models(REGISTRY, "qwen3-8b", as_json=True)
    rows = json.loads(capsys.readouterr().out)

    assert [row["key"] for row in rows] == list(REGISTRY.specs)
    first = rows[0]
    assert (first["gpu"], first["n_gpu"], first["dollars_per_hour"], first["max_model_len"]) == ("H100", 1, 3.95, 40960)
    assert (first["tool_call_parser"], first["reasoning_parser"], first["gated"]) == ("hermes", "qwen3", False)
    assert [row["key"] for row in rows if row["default"]] == ["qwen3-8b"]


def test_models_as_json_are_not_wrapped_by_a_narrow_terminal(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program reads it."""
    monkeypatch.setenv("COLUMNS", "20")
    print_models(REGISTRY, "qwen3-8b", as_json=True)

    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("columns", ["20", "80", "200"])
def test_models_as_table_show_each_whole(capsys: Capture, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    """Whatever the terminal's width no name is cut: people copy from here."""
    monkeypatch.setenv("COLUMNS", columns)
    print_models(REGISTRY, "qwen3-8b", as_json=False)
    lines = capsys.readouterr().out.splitlines()

    for spec in REGISTRY.specs.values():
        line = next(line for line in lines if line.startswith(f"{spec.key} "))
        assert spec.hub_id is None or line.rstrip().endswith(spec.hub_id)
        assert f"{spec.tier.dollars_per_hour:.2f}" in line
        assert f"{spec.max_model_len:,}" in line
        assert ("yes" in line.split()) == spec.gated


def test_models_as_table_mark_the_default_and_date_the_prices(capsys: Capture) -> None:
    """The star is explained below."""
    print_models(REGISTRY, "gemma-3-12b", as_json=False)
    out = capsys.readouterr().out

    assert [line.split()[0] for line in out.splitlines() if line.split()[1:2] == ["*"]] == ["gemma-3-12b"]
    assert "2026-09-26" in out


def test_models_as_table_show_an_entry_that_says_little(capsys: Capture) -> None:
    """A dash for what vLLM decides by itself."""
    registry = Registry({"mine": ModelSpec(key="mine", hub_id="org/mine")})
    print_models(registry, "mine", as_json=False)

    assert next(line for line in capsys.readouterr().out.splitlines() if line.startswith("mine")).count(" - ") >= 2


@pytest.mark.parametrize("default", ["llm", "qwen3-8b", "QWEN/qwen3-8b-FP8", "qwen3-8b-h200"])
def test_models_can_be_listed_under_any_name_of_the_default(capsys: Capture, default: str) -> None:
    """`SERVICE_MODEL=llm` is the default model by its other name."""
    print_models(REGISTRY, default, as_json=True)

    assert [row["key"] for row in json.loads(capsys.readouterr().out) if row["default"]] == ["qwen3-8b"]


def test_models_with_an_unknown_default_are_refused() -> None:
    """As at a deploy."""
    with pytest.raises(UnknownModelError):
        print_models(REGISTRY, "nothing-like-it", as_json=True)


def test_models_as_table_with_a_long_name_cut_no_cell(capsys: Capture) -> None:
    """A models file may name repositories that are longer than those of the built-in entries."""
    spec = REGISTRY.specs["qwen3-8b"].model_copy(update={"key": "long", "hub_id": f"organisation/{'x' * 80}"})
    print_models(Registry({"long": spec}), "long", as_json=False)
    out = capsys.readouterr().out

    assert f"organisation/{'x' * 80}" in out
    assert "40,960" in out
    assert "…" not in out
