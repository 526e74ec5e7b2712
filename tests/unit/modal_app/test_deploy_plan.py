"""Which apps a deploy publishes, and what each is published from."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from service.errors import RegistryError, ServiceError, UsageError
from service.modal_app.deploy_plan import DeployPlan, DeployRequest, make_plan
from service.modal_app.digests import Digest, new_run
from service.settings import Settings

MODELS = """
[models.small]
hub_id = "me/small"
gpu = "L4"
weights_gb = 8
[models.large]
hub_id = "me/large"
gpu = "H200"
n_gpu = 2
weights_gb = 200
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """The user's models file."""
    file = tmp_path / "models.toml"
    file.write_text(MODELS)
    return file


def planned(
    models: Path, *names: str, gpu: str | None = None, all_gpus: bool = False, per_model: bool = False, **environ: str
) -> DeployPlan:
    """Return the plan of a command."""
    settings = Settings.load({"SERVICE_MODELS_FILE": str(models), **environ})
    return make_plan(DeployRequest(names, gpu, all_gpus, per_model), settings, lambda _: None)


def shape(plan: DeployPlan) -> dict[str, list[str]]:
    """Return the models of each app."""
    return {app.name: [spec.key for spec in app.models] for app in plan.apps}


def test_plan_without_names_has_the_default_models_tier_and_the_gateway(models: Path) -> None:
    """The same that two plain deploys publish."""
    plan = planned(models)
    assert shape(plan) == {"vllm-h100": ["qwen3-8b"], "vllm-gateway": []}
    assert [app.module for app in plan.apps] == ["service.server", "service.gateway_app"]


def test_plan_has_a_tier_for_each_gpu_and_the_first_name_as_default(models: Path) -> None:
    """Models of one tier share its app; the gateway's default is the first of all, a tier's the first of its own."""
    plan = planned(models, "small", "large", "tiny-l4")
    assert shape(plan) == {"vllm-l4": ["small", "tiny"], "vllm-h200x2": ["large"], "vllm-gateway": []}
    assert [app.settings.model for app in plan.apps] == ["small", "large", "small"]
    assert planned(models, "small", SERVICE_MODEL="tiny").settings.model == "tiny"


def test_plan_on_a_gpu_leads_every_name_there(models: Path) -> None:
    """The gateway has the same setting as the tier, so it looks for models where they were deployed."""
    plan = planned(models, "small", gpu="h200:2")
    assert shape(plan) == {"vllm-h200x2": ["small"], "vllm-gateway": []}
    assert [(app.settings.gpu, app.settings.n_gpu) for app in plan.apps] == [("H200", 2), ("H200", 2)]


def test_plan_of_all_gpus_leaves_out_what_does_not_fit(models: Path) -> None:
    """The tiers of the seeds; a model is left out of those whose memory is smaller than its weights."""
    plan = planned(models, "gemma-3-27b", all_gpus=True)
    tiers = ["vllm-a100", "vllm-h100", "vllm-h200", "vllm-b200"]
    assert shape(plan) == {**{app: ["gemma-3-27b"] for app in tiers}, "vllm-gateway": []}
    assert [note.partition(":")[2][:50] for note in plan.notes] == [
        " Model 'gemma-3-27b' does not fit on L40S: its wei"
    ]
    assert [app for app in shape(planned(models, all_gpus=True)) if "l40s" in app] == ["vllm-l40s"]


def test_plan_per_model_has_an_app_for_each_which_no_other_entry_concerns(models: Path) -> None:
    """Named after model and tier; the gateway finds it before the tier. `SERVICE_APP` cannot name several."""
    plan = planned(models, "small", "large", "tiny-l4", per_model=True)
    apps = {"vllm-small-l4": ["small"], "vllm-tiny-l4": ["tiny"], "vllm-large-h200x2": ["large"]}
    assert shape(plan) == {**apps, "vllm-gateway": []}
    models.write_text(MODELS.replace("weights_gb = 8", "weights_gb = 9"))
    after = planned(models, "small", "large", "tiny-l4", per_model=True)
    changed = [now.changes_since(then) for now, then in zip(digests(after), digests(plan), strict=True)]
    assert changed == [("entries",), (), (), ("entries",)]
    with pytest.raises(UsageError, match="SERVICE_APP='team' is set"):
        planned(models, per_model=True, SERVICE_APP="team")


@pytest.mark.parametrize(
    ("names", "environ", "error", "words"),
    [
        (["small", "large"], {"SERVICE_APP": "team"}, UsageError, "these models need 2 tiers: L4, 2 x H200"),
        (["large-l4"], {}, UsageError, "Model 'large' does not fit on L4"),
        (["gpt-oss-20b-t4"], {}, UsageError, "from compute capability 8.0 on, and T4 has 7.5"),
        (["gpt-oss-20b"], {"SERVICE_GPU": "T4"}, UsageError, r"Use --gpu L4 \(L4, .* or --gpu H100 \(H100"),
        (["wrong"], {}, RegistryError, "which vLLM does not know"),
        (["local"], {}, RegistryError, "which no container has"),
    ],
)
def test_plan_of_what_cannot_be_served_is_refused(
    models: Path, names: list[str], environ: dict[str, str], error: type[ServiceError], words: str
) -> None:
    """Before anything is asked of Modal."""
    models.write_text(
        MODELS
        + '[models.wrong]\nhub_id = "me/wrong"\nextra_args = ["--no-such-flag"]\n'
        + '[models.local]\npath = "/models/local"\n'
    )
    with pytest.raises(error, match=words):
        planned(models, *names, **environ)


def test_plan_of_a_gpu_and_all_gpus_is_refused(models: Path) -> None:
    """Two different questions."""
    with pytest.raises(UsageError, match="--gpu and --all-gpus were both given"):
        planned(models, gpu="L4", all_gpus=True)


def test_plan_of_a_gated_model_needs_its_secret(models: Path) -> None:
    """Also where it is not the first of its tier."""
    with pytest.raises(ServiceError, match="needs Modal's secret 'huggingface'"):
        make_plan(DeployRequest(("qwen3-8b", "llama-3.1-8b")), Settings.load({}), lambda _: "not found")


def digests(plan: DeployPlan) -> list[Digest]:
    """Return the digests of the apps."""
    return [app.digest for app in plan.apps]


@pytest.mark.parametrize(
    ("old", "new", "environ", "changed"),
    [
        ("", "", {}, [(), ()]),
        ('hub_id = "me/small"', 'hub_id = "me/small"\nextra_args = ["--seed", "1"]', {}, [("entries",), ()]),
        ("weights_gb = 8", "weights_gb = 8\nmax_model_len = 64", {}, [("entries",), ("entries",)]),
        ('hub_id = "me/large"', 'hub_id = "me/larger"', {}, [(), ("entries",)]),
        ("", "", {"SERVICE_HOLD_S": "9"}, [(), ("settings",)]),
        ("", "", {"SERVICE_SNAPSHOT": "off"}, [("settings",), ()]),
        ("", "", {"SERVICE_MAX_INPUTS": "9"}, [("settings",), ("settings",)]),
    ],
)
def test_digest_tells_which_apps_a_change_concerns(
    models: Path, old: str, new: str, environ: dict[str, str], changed: list[tuple[str, ...]]
) -> None:
    """An entry's change concerns the tier that its name leads to, and the gateway where it reads that field."""
    before = digests(planned(models, "small"))
    models.write_text(MODELS.replace(old, new, 1) if old else MODELS)
    after = digests(planned(models, "small", **environ))
    assert [now.changes_since(then) for now, then in zip(after, before, strict=True)] == changed


def test_digest_survives_as_a_tag(models: Path) -> None:
    """Modal takes tags of 50 characters; another tag is none of ours."""
    digest = digests(planned(models))[0].of_run(new_run())
    assert len(digest.tag()) <= 50
    assert Digest.parse(digest.tag()) == digest
    assert Digest.parse("v1.2") is None
    assert Digest.parse("") is None


def test_runs_of_one_second_sort_as_they_began(models: Path) -> None:
    """A rollback takes the newest of them; two quick deploys may begin within a second."""
    runs = []
    for _ in range(50):
        runs.append(new_run())
        time.sleep(1e-3)
    assert runs == sorted(runs)
    tag = digests(planned(models))[0].of_run(runs[0]).tag()
    assert Digest.parse(tag) is not None


def test_digest_changes_with_the_receiver_of_traces(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a deploy with another receiver, or another token for it, is not taken for one that changes nothing."""
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    digests = [app.digest.settings for app in planned(models).apps]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-token=1")
    assert [app.digest.settings for app in planned(models).apps] == digests
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    first = [app.digest.settings for app in planned(models).apps]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-token=2")
    second = [app.digest.settings for app in planned(models).apps]
    assert all(len({*found}) == 3 for found in zip(digests, first, second, strict=True))


def test_plan_notes_variables_with_which_nothing_is_exported(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The containers never get them, so nothing else would say so."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    (note,) = planned(models).notes
    assert note.startswith("No traces are exported: OTEL_EXPORTER_OTLP_PROTOCOL='grpc' is not http/protobuf")
