"""A models file of the user's own: its fields, and every error."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.errors import RegistryError
from service.registry.models import ModelSpec, Registry

GOOD = '[models.mine]\nhub_id = "org/mine"\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return the path of this test's models file."""
    return tmp_path / "models.toml"


def loaded(file: Path, text: str) -> Registry:
    """Write the file and load the registry with it."""
    file.write_text(text)
    return Registry.load(file)


def refusal(file: Path, text: str) -> str:
    """Return the error of a models file, after checking that it names the file, in one line."""
    file.write_text(text)
    with pytest.raises(RegistryError) as caught:
        Registry.load(file)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_models_file_adds_an_entry(file: Path) -> None:
    """The built-in models stay; the user's one comes after them."""
    registry = loaded(file, GOOD)

    assert registry.resolve("org/MINE").spec.key == "mine"
    assert "qwen3-8b" in registry.specs


def test_models_file_replaces_an_entry_by_its_key(file: Path) -> None:
    """Nothing of the replaced entry is kept."""
    registry = loaded(file, '[models.qwen3-8b]\nhub_id = "org/other"\n')

    assert registry.specs["qwen3-8b"] == ModelSpec(key="qwen3-8b", hub_id="org/other", task="generate")


def test_models_file_may_use_every_field(file: Path) -> None:
    """Each field of an entry can be written in TOML, arrays and tables too."""
    spec = (
        loaded(
            file,
            """[models.mine]
hub_id = "org/mine"
revision = "0123456789012345678901234567890123456789"
aliases = ["my-model", "Also.Mine"]
gated = true
gpu = "h200"
n_gpu = 2
max_containers = 3
weights_gb = 100
min_compute_capability = 8
max_model_len = 4096
cpu_max_model_len = 2048
modalities = ["text", "image"]
tool_call_parser = "hermes"
reasoning_parser = "qwen3"
chat_template = "x.jinja"
kv_cache_dtype = "fp8"
moe_backend = "flashinfer_cutlass"
async_scheduling = false
fusion_passes = ["eliminate_noops"]
limit_mm_per_prompt = { image = 4 }
ignore_patterns = ["original/*"]
fallback = ["tiny"]
fallback_default = "allow"
price = { input = 0.1, cached = 0.02, output = 0.4 }
extra_args = ["--seed", "1"]
speculative = { method = "mtp", num_speculative_tokens = 3 }
max_lora_rank = 32
max_cpu_loras = 4
[[models.mine.adapters]]
name = "bot"
hub_id = "org/bot"
""",
        )
        .resolve("also.mine")
        .spec
    )

    assert (spec.gpu, spec.weights_gb, spec.modalities) == ("H200", 100.0, ("text", "image"))
    assert spec.min_compute_capability == 8.0
    assert {name for name in ModelSpec.model_fields if name not in spec.model_fields_set} == {"path", "volume"}


def test_models_file_path_is_relative_to_the_file(file: Path) -> None:
    """The file and the model's directory travel together."""
    spec = loaded(file, '[models.mine]\npath = "weights/mine"\n').specs["mine"]

    assert spec.directory == file.parent / "weights" / "mine"


def test_models_file_chat_template_beside_the_file_is_taken(file: Path) -> None:
    """Any other is one of the package's."""
    (file.parent / "mine.jinja").write_text("{{ messages }}")
    registry = loaded(
        file, f'{GOOD}chat_template = "mine.jinja"\n[models.b]\npath = "b"\nchat_template = "x/y.jinja"\n'
    )

    assert registry.specs["mine"].chat_template_file == (file.parent / "mine.jinja").resolve()
    assert registry.specs["b"].chat_template == "x/y.jinja"


def test_models_file_context_is_for_a_machine_without_a_gpu_too(file: Path) -> None:
    """A built-in entry's is what fits on its GPU; a field of its own tells the two apart."""
    registry = loaded(file, f"{GOOD}max_model_len = 49152\n[models.b]\npath = 'b'\ncpu_max_model_len = 16384\n")

    assert registry.specs["mine"].cpu_max_model_len == 49152
    assert (registry.specs["b"].cpu_max_model_len, registry.specs["b"].max_model_len) == (16384, None)
    assert registry.specs["qwen3-8b"].cpu_max_model_len is None


def test_models_file_two_entries_may_serve_one_repository(file: Path) -> None:
    """The hub id then means the first of them; each has its key."""
    registry = loaded(file, '[models.mine]\nhub_id = "Qwen/Qwen3-8B-FP8"\nmax_model_len = 4096\n')

    assert registry.resolve("Qwen/Qwen3-8B-FP8").spec.key == "qwen3-8b"
    assert registry.resolve("mine").spec.max_model_len == 4096


def test_models_file_missing_is_named(tmp_path: Path) -> None:
    """The error has the path, the reason and the variable."""
    with pytest.raises(RegistryError, match=r"nowhere\.toml.*No such file.*SERVICE_MODELS_FILE"):
        Registry.load(tmp_path / "nowhere.toml")


def test_models_file_that_is_a_directory_is_named(tmp_path: Path) -> None:
    """A directory is no models file."""
    with pytest.raises(RegistryError, match="directory"):
        Registry.load(tmp_path)


@pytest.mark.parametrize("text", ["[models.mine\n", "just words", '[models.a]\nhub_id = "a/b"\n[models.a]\n'])
def test_models_file_that_is_no_toml_is_named_with_the_place(file: Path, text: str) -> None:
    """Wrong syntax, prose, and a table that is there twice."""
    sentence = refusal(file, text)

    assert f"'{file}' is not TOML" in sentence
    assert "line" in sentence


def test_models_file_that_is_no_text_is_named(file: Path) -> None:
    """A binary file is no TOML either."""
    file.write_bytes(b"\xff\xfe\x00")

    with pytest.raises(RegistryError, match="is not TOML"):
        Registry.load(file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no [models.<key>] table"),
        ("models = 5\n", "has no [models.<key>] table"),
        ("[mine]\nhub_id = 'a/b'\n", "holds 'mine' at its top"),
        ("colour = 1\n" + GOOD, "holds 'colour' at its top"),
        ("[models]\nmine = 'a/b'\n", "model 'mine': 'a/b' is not a table"),
    ],
)
def test_models_file_of_another_shape_shows_the_right_one(file: Path, text: str, said: str) -> None:
    """The error names the file and shows how an entry begins."""
    sentence = refusal(file, text)

    assert str(file) in sentence
    assert said in sentence
    assert "[models." in sentence


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("revision = 'main'", "revision", "'main'"),
        ("revision = 5", "revision", "5"),
        ("gated = 'yes'", "gated", "'yes'"),
        ("gpu = 4", "gpu", "4"),
        ("n_gpu = 0", "n_gpu", "0"),
        ("n_gpu = 9", "n_gpu", "9"),
        ("n_gpu = '2'", "n_gpu", "'2'"),
        ("weights_gb = 0", "weights_gb", "0"),
        ("weights_gb = -1.5", "weights_gb", "-1.5"),
        ("weights_gb = '9 GB'", "weights_gb", "'9 GB'"),
        ("weights_gb = true", "weights_gb", "True"),
        ("max_model_len = 15", "max_model_len", "15"),
        ("max_model_len = 4096.5", "max_model_len", "4096.5"),
        ("modalities = ['smell']", "modalities.0", "'smell'"),
        ("modalities = 'text'", "modalities", "'text'"),
        ("aliases = 'one'", "aliases", "'one'"),
        ("aliases = [1]", "aliases.0", "1"),
        ("tool_call_parser = 1", "tool_call_parser", "1"),
        ("reasoning_parser = []", "reasoning_parser", "()"),
        ("chat_template = 1", "chat_template", "1"),
        ("kv_cache_dtype = 8", "kv_cache_dtype", "8"),
        ("moe_backend = 1", "moe_backend", "1"),
        ("async_scheduling = 1", "async_scheduling", "1"),
        ("fusion_passes = 'x'", "fusion_passes", "'x'"),
        ("limit_mm_per_prompt = { image = 'four' }", "limit_mm_per_prompt.image", "'four'"),
        ("limit_mm_per_prompt = 4", "limit_mm_per_prompt", "4"),
        ("ignore_patterns = 1", "ignore_patterns", "1"),
        ("extra_args = '--seed 1'", "extra_args", "'--seed 1'"),
        ("speculative = { method = 'magic', num_speculative_tokens = 3 }", "speculative.method", "'magic'"),
        ("speculative = { method = 'mtp', num_speculative_tokens = 0 }", "speculative.num_speculative_tokens", "0"),
        ("speculative = 'mtp'", "speculative", "'mtp'"),
    ],
)
def test_models_file_with_a_wrong_value_names_entry_field_and_value(
    file: Path, line: str, field: str, value: str
) -> None:
    """Types are strict: what is a number in TOML is a number here."""
    sentence = refusal(file, f"{GOOD}{line}\n")

    assert f"'{file}', model 'mine': field '{field}' is {value}" in sentence


@pytest.mark.parametrize("line", ["hub_id = 'no-slash'", "hub_id = 5", "hub_id = 'a b/c'", "path = ''", "path = 5"])
def test_models_file_with_a_wrong_source_names_the_field(file: Path, line: str) -> None:
    """Neither a hub id nor a directory can be just anything."""
    field = line.split(" ", maxsplit=1)[0]

    assert f"model 'mine': field '{field}' is " in refusal(file, f"[models.mine]\n{line}\n")


@pytest.mark.parametrize("fields", ["", "hub_id = 'a/b'\npath = 'c'\n"])
def test_models_file_with_no_source_or_two_is_refused(file: Path, fields: str) -> None:
    """Exactly one of hub_id and path."""
    assert "model 'mine': give exactly one of hub_id" in refusal(file, f"[models.mine]\n{fields}")


@pytest.mark.parametrize(
    ("line", "named", "nearest"),
    [
        ("hubid = 'a/b'", "'hubid'", "'hub_id'"),
        ("max_len = 5", "'max_len'", "'max_model_len'"),
        (
            "speculative = { method = 'mtp', num_speculative_tokens = 3, num_tokens = 3 }",
            "num_tokens'",
            "'num_speculative_tokens'",
        ),
    ],
)
def test_models_file_with_an_unknown_field_offers_the_nearest(file: Path, line: str, named: str, nearest: str) -> None:
    """A typo in a field must not silently serve a default."""
    sentence = refusal(file, f"{GOOD}{line}\n")

    assert "model 'mine': " in sentence
    assert named in sentence
    assert f"Did you mean {nearest}?" in sentence


def test_models_file_with_several_errors_names_all_of_them(file: Path) -> None:
    """Of one entry and of several: a user corrects them in one go."""
    sentence = refusal(file, f"{GOOD}n_gpu = 9\ngpu = 'H1000'\nmax_len = 5\n[models.other]\nhub_id = 'no-slash'\n")

    for words in (
        "model 'mine': field 'n_gpu' is 9",
        "Also, model 'mine': unknown field 'max_len'",
        "Unknown GPU 'H1000'",
        "Also, model 'other': field 'hub_id' is 'no-slash'",
    ):
        assert sentence.count(words) == 1


def test_models_file_with_a_missing_field_names_it(file: Path) -> None:
    """Speculative decoding needs the number of draft tokens."""
    sentence = refusal(file, f"{GOOD}speculative = {{ method = 'mtp' }}\n")

    assert "field 'speculative.num_speculative_tokens' is missing" in sentence


@pytest.mark.parametrize("key", ["Mine", "'my model'", "'a/b'", "'-x'"])
def test_models_file_with_a_key_that_no_name_can_be_is_refused(file: Path, key: str) -> None:
    """Keys are lower case, digits, dots and dashes."""
    assert "field 'key' is" in refusal(file, f"[models.{key}]\nhub_id = 'a/b'\n")


def test_models_file_with_an_unknown_gpu_offers_the_nearest(file: Path) -> None:
    """As in a setting."""
    sentence = refusal(file, f"{GOOD}gpu = 'H1000'\n")

    assert "model 'mine': " in sentence
    assert "Unknown GPU 'H1000'. Did you mean" in sentence


def test_models_file_with_more_gpus_than_a_container_holds_names_the_entry(file: Path) -> None:
    """Modal attaches at most four A10 to a container."""
    sentence = refusal(file, f"{GOOD}gpu = 'A10'\nn_gpu = 8\n")

    assert "model 'mine': 8 x A10" in sentence


@pytest.mark.parametrize(
    ("alias", "owner"),
    [("qwen3-4b", "model 'qwen3-4b'"), ("QWEN3-4B", "model 'qwen3-4b'"), ("llm", "the default model"),
     ("Qwen/Qwen3-4B-Instruct-2507", "model 'qwen3-4b'")],
)  # fmt: skip
def test_models_file_with_a_taken_alias_names_both_models(file: Path, alias: str, owner: str) -> None:
    """A name means one model: neither a key, nor an alias, nor another's hub id may be reused."""
    sentence = refusal(file, f"{GOOD}aliases = ['{alias}']\n")

    assert f"'{alias}' of model 'mine' is already a name of {owner}" in sentence


def test_models_file_with_one_alias_in_two_entries_names_both(file: Path) -> None:
    """Both entries are the user's own here."""
    sentence = refusal(file, GOOD + "aliases = ['x']\n[models.yours]\nhub_id = 'a/b'\naliases = ['X']\n")

    assert "'X' of model 'yours' is already a name of model 'mine'" in sentence


def test_models_file_with_a_taken_alias_names_the_file(file: Path) -> None:
    """A user may have several files."""
    assert str(file) in refusal(file, f"{GOOD}aliases = ['qwen3-4b']\n")


def test_models_file_with_the_key_llm_is_refused(file: Path) -> None:
    """`llm` is the default model and cannot be an entry."""
    assert "'llm'" in refusal(file, "[models.llm]\nhub_id = 'a/b'\n")


def test_aliases_give_models_further_names(file: Path) -> None:
    """An alias names any model, `llm` or a GPU too; one that ends in `*` is for requests alone."""
    registry = loaded(
        file, '[aliases]\n"gpt-4o" = "qwen3-8b"\n"Mine.Fast" = "qwen3-0.6b-l40s"\n"o1" = "llm"\n"claude-*" = "tiny"\n'
    )

    assert registry.resolve("GPT-4o").spec.key == "qwen3-8b"
    fast = registry.resolve("mine.fast")
    assert (fast.spec.key, fast.gpu and fast.gpu.name) == ("qwen3-0.6b", "L40S")
    assert registry.resolve("o1", "gemma-3-12b").spec.key == "gemma-3-12b"
    assert registry.find("claude-haiku-4-5") is None
    assert "tiny" in registry.specs


def test_alias_with_the_longest_pattern_counts(file: Path) -> None:
    """A family has one model, one of its names another."""
    registry = loaded(file, '[aliases]\n"claude-*" = "qwen3-8b"\n"claude-haiku-*" = "tiny"\n')

    assert registry.find_pattern("Claude-Haiku-4-5-20251001").spec.key == "tiny"  # type: ignore[union-attr]
    assert registry.find_pattern("claude-opus-4-5").spec.key == "qwen3-8b"  # type: ignore[union-attr]
    assert registry.find_pattern("gpt-4o") is None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('"gpt-4o" = "qwen3-8"', "Alias 'gpt-4o' means 'qwen3-8', which is no model. Did you mean 'qwen3-8b'?"),
        ('"a" = "b"\n"b" = "tiny"', "Alias 'a' means 'b', which is no model"),
        ('"tiny" = "qwen3-8b"', "Alias 'tiny' is already a name of a model"),
        ('"llm" = "qwen3-8b"', "Alias 'llm' is already a name of a model"),
        ('"tiny-h100" = "qwen3-8b"', "Alias 'tiny-h100' is already a name of a model"),
        ('"*-mini" = "tiny"', "Alias '*-mini': '*' may only be its last character"),
        ('"gpt-4o" = 5', "[aliases] is not a table of names"),
    ],
)
def test_alias_that_is_wrong_is_refused_by_name(file: Path, line: str, said: str) -> None:
    """The error names the file and the alias."""
    sentence = refusal(file, f"[aliases]\n{line}\n")

    assert f"'{file}'" in sentence
    assert said in sentence


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fallback = ['tinny']", "Model 'mine' has the fallback 'tinny', which is no model. Did you mean 'tiny'?"),
        ("fallback = ['mine']", "The fallbacks of model 'mine' lead back to it: mine -> mine"),
        ("fallback = ['org/mine']", "lead back to it: mine -> mine"),
        (
            "fallback = ['tiny', 'b']\n[models.b]\npath = 'b'\nfallback = ['mine-h200']",
            "lead back to it: mine -> b -> mine",
        ),
        ("fallback = ['tiny']\ntask = 'embed'", "has the fallback 'tiny' of another task: generate, not embed"),
        ("fallback = 'tiny'", "field 'fallback' is 'tiny'"),
        ("fallback_default = 'yes'", "field 'fallback_default' is 'yes'"),
    ],
)
def test_fallback_that_is_wrong_is_refused(file: Path, text: str, said: str) -> None:
    """An unknown name, itself, a circle."""
    assert said in refusal(file, f"{GOOD}{text}\n")


def test_fallback_may_be_any_name_of_another_model(file: Path) -> None:
    """A hub id, an alias, one on a GPU; two models may share one."""
    names = ["Qwen/Qwen3-0.6B", "fast", "qwen3-4b-h100"]
    text = f"{GOOD}fallback = {names}\n[models.b]\npath = 'b'\nfallback = ['mine', 'tiny']\n[aliases]\nfast = 'tiny'\n"
    assert loaded(file, text).specs["mine"].fallback == tuple(names)


@pytest.mark.parametrize(
    ("fields", "task"),
    [
        ("", "generate"),
        ('extra_args = ["--runner", "pooling"]\n', "embed"),
        ('extra_args = ["--runner", "pooling", "--convert", "classify"]\n', "classify"),
        ('task = "embed"\n', "embed"),
        ('task = "transcription"\n', "transcription"),
    ],
)
def test_models_file_entry_has_a_task(file: Path, fields: str, task: str) -> None:
    """The gateway refuses routes for another one before a wake; most models generate."""
    registry = loaded(file, f'[models.mine]\nhub_id = "me/mine"\n{fields}')

    assert registry.specs["mine"].task == task
    assert registry.specs["qwen3-8b"].task == "generate"
