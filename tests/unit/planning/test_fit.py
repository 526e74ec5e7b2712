"""Which models fit which GPUs: the seeds' own tables, every entry on its own tier, and the parts of the sum."""

from __future__ import annotations

from dataclasses import replace

import pytest

from service.planning.changes import changes, cheapest
from service.planning.fit import Fit, PlannedModel, Verdict, fit
from service.planning.models import planned_model
from service.planning.ranges import Range
from service.registry.configs import known_config
from service.registry.gpus import find_gpu
from service.registry.models import ModelSpec, Registry
from service.registry.prices import Prices
from service.registry.tiers import Tier, tier_of

SPECS = Registry.load().specs
# The tables of model and GPU pairs that this service started from, as they stood there, and whether a pair fits.
TABLES = {
    # five apps, "each serving all models"
    **{("gemma-3-12b", gpu): True for gpu in ("L40S", "A100-80GB", "H100", "H200", "B200")},
    ("gemma-3-27b", "L40S"): False,  # 54.9 GB of weights
    **{("gemma-3-27b", gpu): True for gpu in ("A100-80GB", "H100", "H200", "B200")},
    ("qwen3-vl-30b", "L40S"): False,  # 62.1 GB of weights
    **{("qwen3-vl-30b", gpu): True for gpu in ("A100-80GB", "H100", "H200", "B200")},
    # "Model Registry", GPU
    ("llama-3.1-8b", "A10G"): True,
    ("qwen3-4b", "A10G"): True,
    ("qwen3-30b-a3b", "A10G"): False,  # 61.1 GB of weights, although "4B-30B models" are best for it there
    ("qwen3-235b", "A100-80GB"): False,  # 236.4 GB of weights
    ("gpt-oss-20b", "H100"): True,
    ("gpt-oss-120b", "H100"): True,
    # "GPU Selection" for Qwen3-8B-FP8, and Modal's example on a B200
    **{("qwen3-8b", gpu): True for gpu in ("H100", "H200", "B200", "A100-40GB", "A100-80GB")},
    ("llama-3.1-8b-fp8", "B200"): True,
}


def fitted(key: str, gpu: str | None = None, n_gpu: int | None = None, **options: object) -> Fit:
    """Return how an entry fits a GPU, else its own."""
    spec = SPECS[key]
    tier = tier_of(spec, find_gpu(gpu) if gpu else None, n_gpu)
    return fit(planned_model(spec, offline=True), tier, **({"fast_boot": True} | options))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is in the hub cache: shapes are the registry's."""
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))


@pytest.mark.parametrize(("key", "gpu"), TABLES)
def test_pair_of_the_first_tables_fits_or_does_not(key: str, gpu: str) -> None:
    """Without doubt either way: no range decides it."""
    assert fitted(key, gpu).verdict is (Verdict.FITS if TABLES[key, gpu] else Verdict.DOES_NOT_FIT)


@pytest.mark.parametrize("key", SPECS)
def test_every_entry_fits_its_own_tier(key: str) -> None:
    """With the context that it serves, fast boot or not."""
    assert fitted(key).verdict is Verdict.FITS
    assert fitted(key, fast_boot=False).kv_bytes.low < fitted(key).kv_bytes.low


@pytest.mark.parametrize(("key", "gpu"), TABLES)
def test_weights_that_do_not_fit_a_tier_do_not_fit_a_plan(key: str, gpu: str) -> None:
    """The rule that deploys use, which counts the weights alone, never refuses what a plan holds for fitting."""
    one = fitted(key, gpu)
    assert one.tier.holds(SPECS[key]) or one.verdict is Verdict.DOES_NOT_FIT


def test_parts_and_cache_are_the_memory() -> None:
    """The draft, the activations and the graphs are counted; a range has its ends in order."""
    one = fitted("gpt-oss-20b", fast_boot=False)
    assert list(one.parts) == ["weights", "draft", "activations", "CUDA graphs", "CUDA and libraries"]
    assert one.parts["weights"] == Range(13.8e9, 13.8e9)
    assert one.parts["draft"].high == pytest.approx(1.7e9, rel=0.02)  # as its published conversion
    assert one.memory.low == pytest.approx(80e9 * 0.92)
    assert one.kv_bytes.low == pytest.approx(one.memory.low - sum(part.high for part in one.parts.values()))
    assert all(part.low <= part.high for part in (*one.parts.values(), one.kv_bytes))


def test_draft_has_a_layer_of_the_cache() -> None:
    """25 layers of gpt-oss-20b, 13 of which keep every token: in 8 bits on its own GPU, in 16 on an older one."""
    own, older = fitted("gpt-oss-20b"), fitted("gpt-oss-20b", "A100-80GB")
    assert (own.kv_cache_dtype, own.cache.token_bytes) == ("fp8", 13 * 1024)
    assert (older.kv_cache_dtype, older.cache.token_bytes) == (None, 13 * 2048)


def test_context_decides_what_fits() -> None:
    """One request of the whole context must fit, as vLLM demands."""
    assert fitted("qwen3-8b", "T4").verdict is Verdict.DOES_NOT_FIT
    longest = fitted("qwen3-8b", "T4").longest
    assert 16_384 < longest < 40_960
    assert fitted("qwen3-8b", "T4", max_model_len=longest).verdict is Verdict.FITS


def test_several_gpus_share_weights_and_heads() -> None:
    """Half of each on two; what vLLM cannot spread is refused."""
    one, two = fitted("qwen3-8b"), fitted("qwen3-8b", "H100", 2)
    assert (two.parts["weights"].low, two.cache.token_bytes) == (9.4e9 / 2, one.cache.token_bytes / 2)
    three = fitted("qwen3-8b", "H100", 3)
    assert (three.verdict, three.why_refused) == (
        Verdict.DOES_NOT_FIT,
        "vLLM does not spread 32 attention heads over 3 GPUs.",
    )


def test_arguments_of_an_entry_are_counted() -> None:
    """Its share of the memory, the size of its steps, and its context, which stand last on vLLM's command line."""
    plain = planned_model(SPECS["qwen3-8b"], offline=True)
    own = (
        "--gpu-memory-utilization=0.5",
        "--max-num-seqs",
        "64",
        "--max-num-batched-tokens",
        "1024",
        "--max-model-len=4096",
    )
    changed = fit(
        PlannedModel(plain.spec.model_copy(update={"extra_args": own}), plain.config, plain.weights_bytes),
        plain.spec.tier,
        fast_boot=True,
    )
    assert (changed.memory.low, changed.max_model_len) == (pytest.approx(40e9), 4096)
    assert changed.parts["activations"].high < fitted("qwen3-8b").parts["activations"].high / 4
    assert changed.cache.in_flight_tokens == 2048


def test_gpu_without_kernels_is_refused() -> None:
    """A T4 has the memory for gpt-oss-20b, and vLLM has no MXFP4 for it."""
    assert "compute capability 8.0" in str(fitted("gpt-oss-20b", "T4").why_refused)


def texts(key: str, gpu: str, **options: object) -> list[str]:
    """Return the changes that are offered."""
    return [change.text for change in changes(fitted(key, gpu, **options), Prices().of, fast_boot=True)]


def test_changes_begin_with_the_nearest() -> None:
    """A shorter context keeps the tier; then come more GPUs, other weights, another GPU."""
    assert texts("qwen3-8b", "T4")[0].startswith("a shorter context: --max-model-len ")
    shorter, *others = texts("llama-3.1-8b-fp8", "L4")
    assert shorter.startswith("a shorter context: --max-model-len ")
    assert others == ["more GPUs: --gpu L4 --n-gpu 2"]
    found = texts("gemma-3-27b", "L40S")
    assert [text.partition(":")[0].partition(",")[0] for text in found] == [
        "more GPUs",
        "an FP8 variant of the model",
        "another GPU",
    ]


EIGHT_BITS = 'a KV cache in 8 bits: kv_cache_dtype = "fp8" in its entry'


def test_smaller_cache_is_offered_where_the_engine_takes_it() -> None:
    """On the entry's own GPU, not on an older one; and not where the entry has it already."""
    spec = SPECS["llama-3.1-8b-fp8"]
    shape = planned_model(spec, offline=True)
    own = replace(shape, spec=spec.model_copy(update={"gpu": "L4"}))
    found = changes(fit(own, Tier(find_gpu("L4")), fast_boot=True), Prices().of, fast_boot=True)
    assert {change.text: change.fitted.kv_cache_dtype for change in found}[EIGHT_BITS] == "fp8"
    assert EIGHT_BITS not in texts("llama-3.1-8b-fp8", "L4")
    assert EIGHT_BITS not in texts("gpt-oss-20b", "L4")


@pytest.mark.parametrize(("key", "gpu"), [pair for pair, fits in TABLES.items() if not fits])
def test_every_change_that_is_offered_fits(key: str, gpu: str) -> None:
    """Nothing is offered that would fail too."""
    offered = changes(fitted(key, gpu), Prices().of, fast_boot=True)
    assert offered
    assert all(change.fitted.verdict is Verdict.FITS for change in offered)


def test_cheapest_is_the_least_dollars() -> None:
    """Not the least memory: a B300 costs less than four A100s."""
    one = cheapest(fitted("qwen3-235b"), Prices().of, fast_boot=True)
    assert one
    assert one.tier == Tier(find_gpu("B300"))


def test_model_that_nothing_holds_has_no_change() -> None:
    """Eight B300 have 2,304 GB."""
    spec = ModelSpec(key="huge", hub_id="example/huge", weights_gb=3000.0)
    huge = PlannedModel(spec, known_config("Qwen/Qwen3-8B-FP8") or {}, 3e12)
    one = fit(huge, Tier(find_gpu("H100")), fast_boot=True)
    assert (one.verdict, changes(one, Prices().of, fast_boot=True)) == (Verdict.DOES_NOT_FIT, [])
