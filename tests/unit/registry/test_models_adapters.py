"""LoRA adapters of an entry: their fields, their names, and the engine's arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.engine.args import engine_command
from service.errors import RegistryError
from service.registry.entries import Adapter, with_adapter
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
            "adapters": (
                {"name": "one", "hub_id": "e/f"},
                {"name": "two", "path": "x"},
                {"name": "three", "volume": "bot"},
            ),
        }
    )

    assert spec.repositories == (("a/b", A), ("c/d", None), ("e/f", None), ("volume:bot", None))
    assert ModelSpec(key="m", volume="n", revision=A).repositories == (("volume:n", A),)
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
        ('name = "one"\nvolume = "bot"\npath = "x"', "adapter 'one': give exactly one of hub_id"),
        ('name = "one"\nvolume = "Bot"', "field 'adapters.0.volume' is 'Bot'"),
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


def test_entry_with_the_name_of_an_adapter_without_its_gpu_is_refused(file: Path) -> None:
    """It comes after the adapter, and would take no request for that GPU."""
    text = adapter('name = "bot-h100"\npath = "x"') + '[models.bot]\nhub_id = "org/bot"\n'

    assert "'bot-h100' of model 'mine' is already a name of model 'bot'" in refusal(file, text)


@pytest.mark.parametrize(
    ("name", "owner"),
    [("tiny", "model 'tiny'"), ("llm", "the default model"), ("Tiny-H100", "model 'tiny'"),
     ("qwen3-4b-a100-80gb", "model 'qwen3-4b'"), ("llm-l4", "the default model"), ("tiny-local", "model 'tiny'"),
     ("llm-h100-local", "the default model")],
)  # fmt: skip
def test_adapter_with_a_name_of_another_model_names_both(file: Path, name: str, owner: str) -> None:
    """A request must not reach another model than the one it names."""
    sentence = refusal(file, adapter(f'name = "{name}"\npath = "x"'))

    assert f"'{name}' of model 'mine' is already a name of {owner}. Choose another name." in sentence


def test_argv_of_adapters_serves_each_under_its_name() -> None:
    """As JSON: a path may have any character; the model is told as their parent."""
    spec = ModelSpec(key="mine", hub_id="org/mine", max_lora_rank=16, max_cpu_loras=2)
    argv = engine_command(spec, Path("/w"), adapters={"one": Path("/a/one, v=1"), "two": Path("/a/two")}).argv
    begin = argv.index("--enable-lora")

    limits = ("--max-lora-rank", "16", "--max-loras", "2", "--max-cpu-loras", "2")
    assert argv[begin : begin + 8] == ("--enable-lora", *limits, "--lora-modules")
    assert [json.loads(module) for module in argv[begin + 8 : begin + 10]] == [
        {"name": "one", "path": "/a/one, v=1", "base_model_name": "mine"},
        {"name": "two", "path": "/a/two", "base_model_name": "mine"},
    ]


@pytest.mark.parametrize(
    ("fields", "room", "at_once"),
    [
        ({"adapters": 1}, 8, 4),
        ({"adapters": 9}, 9, 4),
        ({"adapters": 1, "max_cpu_loras": 1}, 1, 1),
        ({"max_cpu_loras": 64}, 64, 4),
    ],
)
def test_argv_of_adapters_sets_room_aside_for_four_at_once(fields: dict[str, int], room: int, at_once: int) -> None:
    """More take turns; there is room for those that are loaded while the engine serves, in an entry without any too."""
    parts = tuple(Adapter(name=f"a{i}", path="/a") for i in range(fields.pop("adapters", 0)))
    spec = ModelSpec.model_validate({"key": "mine", "hub_id": "org/mine", "adapters": parts, **fields})
    adapters = {part.name: Path("/a") for part in parts}
    argv = engine_command(spec, Path("/w"), adapters=adapters, device="cpu").argv

    assert (argv[argv.index("--max-cpu-loras") + 1], argv[argv.index("--max-loras") + 1]) == (str(room), str(at_once))
    assert spec.adapter_room == room


def test_entry_with_more_adapters_than_its_room_is_refused(file: Path) -> None:
    """With both numbers."""
    text = '[models.mine]\nhub_id = "org/mine"\nmax_cpu_loras = 1\n' + "".join(
        f'[[models.mine.adapters]]\nname = "{name}"\npath = "p"\n' for name in "xy"
    )
    assert "it has 2 adapters, and max_cpu_loras = 1. Raise max_cpu_loras (at most 64)" in refusal(file, text)


def test_adapter_is_added_to_an_entry_that_has_room_for_it() -> None:
    """Else the error says what to write into the entry."""
    spec = ModelSpec(key="mine", hub_id="org/mine")
    one = Adapter(name="one", hub_id="org/one", revision=A)
    with pytest.raises(RegistryError, match=r"Model 'mine' takes no adapters.* Write max_cpu_loras = 8 into its entry"):
        with_adapter(spec, one)
    roomy = with_adapter(spec.model_copy(update={"max_cpu_loras": 1}), one)
    assert roomy.adapters == (one,)
    with pytest.raises(RegistryError, match="Model 'mine' has 1 adapters, which is all that its engine has room for"):
        with_adapter(roomy, one.model_copy(update={"name": "two"}))
    with pytest.raises(RegistryError, match="adapter 'ONE' has a name that the entry uses already"):
        with_adapter(roomy.model_copy(update={"max_cpu_loras": 2}), one.model_copy(update={"name": "ONE"}))


def test_argv_without_adapters_has_no_lora_arguments() -> None:
    """Memory is set aside for them only where there are any."""
    argv = engine_command(ModelSpec(key="mine", hub_id="org/mine"), Path("/w")).argv

    assert not [flag for flag in argv if "lora" in flag]
