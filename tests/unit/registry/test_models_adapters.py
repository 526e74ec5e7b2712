"""LoRA adapters of an entry: their fields, their names, and the engine's arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.engine.args import engine_command
from service.errors import RegistryError
from service.registry.models import ModelSpec, Registry

GOOD = '[models.mine]\nhub_id = "org/mine"\n'
A = "a" * 40


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return the path of this test's models file."""
    return tmp_path / "models.toml"


def adapter(lines: str) -> str:
    """Return an entry with an adapter of these lines."""
    return f"{GOOD}[[models.mine.adapters]]\n{lines}\n"


def refusal(file: Path, text: str) -> str:
    """Return the error of a models file."""
    file.write_text(text)
    with pytest.raises(RegistryError) as caught:
        Registry.load(file)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_adapters_of_an_entry_are_found_by_their_names(file: Path) -> None:
    """A name of an adapter means its model; paths are relative to the file."""
    file.write_text(
        adapter(f'name = "Bot"\nhub_id = "org/bot"\nrevision = "{A}"')
        + '[[models.mine.adapters]]\nname = "two"\npath = "adapters/two"\n'
    )
    registry = Registry.load(file)
    one, two = registry.specs["mine"].adapters

    assert (one.name, one.hub_id, one.revision, one.directory) == ("Bot", "org/bot", A, None)
    assert two.directory == file.parent / "adapters/two"
    assert registry.resolve("bot").spec.key == registry.resolve("TWO-h200").spec.key == "mine"
    assert registry.specs["mine"].max_lora_rank == 64
    assert "Bot" not in registry.specs["mine"].names, "the engine serves the adapter by that name"


def test_repositories_of_an_entry_are_model_draft_and_adapters() -> None:
    """All that has a commit; directories have none."""
    spec = ModelSpec.model_validate(
        {
            "key": "m",
            "hub_id": "a/b",
            "revision": A,
            "speculative": {"method": "eagle3", "num_speculative_tokens": 2, "hub_id": "c/d"},
            "adapters": ({"name": "one", "hub_id": "e/f"}, {"name": "two", "path": "x"}),
        }
    )

    assert spec.repositories == (("a/b", A), ("c/d", None), ("e/f", None))
    assert Registry.load().specs["tiny"].repositories == ()


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('name = "a b"\npath = "x"', "field 'adapters.0.name' is 'a b'"),
        ('name = "a=b"\npath = "x"', "field 'adapters.0.name' is 'a=b'"),
        ('name = 5\npath = "x"', "field 'adapters.0.name' is 5"),
        ('path = "x"', "field 'adapters.0.name' is missing"),
        ('name = "one"\nhub_id = "no-slash"', "field 'adapters.0.hub_id' is 'no-slash'"),
        ('name = "one"\npath = ""', "field 'adapters.0.path' is ''"),
        ('name = "one"\nhub_id = "a/b"\nrevision = "main"', "field 'adapters.0.revision' is 'main'"),
        ('name = "one"', "adapter 'one': give exactly one of hub_id"),
        ('name = "one"\nhub_id = "a/b"\npath = "x"', "adapter 'one': give exactly one of hub_id"),
        ('name = "one"\npath = "x"\nrank = 8', "unknown field 'adapters.0.rank'."),
        ('nam = "one"\nname = "one"\npath = "x"', "Did you mean 'name'?"),
    ],
)
def test_adapter_that_is_wrong_is_named_by_field_and_value(file: Path, lines: str, said: str) -> None:
    """As a model's own fields are."""
    sentence = refusal(file, adapter(lines))

    assert f"'{file}', model 'mine': " in sentence
    assert said in sentence


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("adapters = 5\n", "field 'adapters' is 5"),
        ("adapters = ['one']\n", "field 'adapters.0' is 'one'"),
        ("max_lora_rank = 24\n", "field 'max_lora_rank' is 24"),
        ("max_lora_rank = '64'\n", "field 'max_lora_rank' is '64'"),
    ],
)
def test_adapters_of_another_shape_are_refused(file: Path, lines: str, said: str) -> None:
    """Ranks are those that the engine has kernels for."""
    assert said in refusal(file, GOOD + lines)


@pytest.mark.parametrize("name", ["mine", "MINE", "x", "org/mine", "one"])
def test_adapter_with_a_name_of_its_own_entry_is_refused(file: Path, name: str) -> None:
    """Key, alias, hub id and the other adapters': a name means one thing."""
    text = '[models.mine]\nhub_id = "org/mine"\naliases = ["x"]\n[[models.mine.adapters]]\nname = "One"\npath = "p"\n'

    assert "mine" in refusal(file, text + f'[[models.mine.adapters]]\nname = "{name}"\npath = "p"\n')


@pytest.mark.parametrize(("name", "owner"), [("tiny", "model 'tiny'"), ("llm", "the default model")])
def test_adapter_with_a_name_of_another_model_names_both(file: Path, name: str, owner: str) -> None:
    """A request must not reach another model than the one it names."""
    sentence = refusal(file, adapter(f'name = "{name}"\npath = "x"'))

    assert f"'{name}' of model 'mine' is already a name of {owner}. Choose another name." in sentence


def test_argv_of_adapters_serves_each_under_its_name() -> None:
    """As JSON: a path may have any character; the model is told as their parent."""
    spec = ModelSpec(key="mine", hub_id="org/mine", max_lora_rank=16)
    argv = engine_command(spec, Path("/w"), adapters={"one": Path("/a/one, v=1"), "two": Path("/a/two")}).argv
    begin = argv.index("--enable-lora")

    assert argv[begin : begin + 6] == ("--enable-lora", "--max-lora-rank", "16", "--max-loras", "2", "--lora-modules")
    assert [json.loads(module) for module in argv[begin + 6 : begin + 8]] == [
        {"name": "one", "path": "/a/one, v=1", "base_model_name": "mine"},
        {"name": "two", "path": "/a/two", "base_model_name": "mine"},
    ]


def test_argv_of_many_adapters_sets_memory_aside_for_four_at_once() -> None:
    """More take turns."""
    adapters = {f"a{i}": Path("/a") for i in range(9)}
    argv = engine_command(ModelSpec(key="mine", hub_id="org/mine"), Path("/w"), adapters=adapters, device="cpu").argv

    assert argv[argv.index("--max-loras") + 1] == "4"


def test_argv_without_adapters_has_no_lora_arguments() -> None:
    """Memory is set aside for them only where there are any."""
    argv = engine_command(ModelSpec(key="mine", hub_id="org/mine"), Path("/w")).argv

    assert not [flag for flag in argv if "lora" in flag]
