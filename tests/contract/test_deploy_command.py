"""`vllm-service deploy` with the real client on the control plane: from an empty account to a service, and back."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from grpclib import GRPCError, Status
from modal_proto import api_pb2 as pb

from tests.contract.commands import diagnosed, run, started
from tests.fakes.modal import ContainerRuntime, ModalPlane

DEPLOY = ("deploy", "tiny", "--gpu", "L4", "--yes")
TIER, GATEWAY, ALONE = "vllm-l4", "vllm-gateway", "vllm-tiny-l4"
MINE = '[models.mine]\nhub_id = "me/mine"\nrevision = "{0}"\ngpu = "L4"\nmax_containers = 3\nmax_model_len = {1}\n'


def versions(plane: ModalPlane) -> dict[str, int]:
    """Return how often each app was published or rolled back."""
    return {name: app.versions for name, app in plane.apps.items() if app.versions}


def made(plane: ModalPlane) -> list[str]:
    """Return what an account has that a deploy makes."""
    return [
        *(name for name in versions(plane) if name != "vllm-prefetch"),
        *plane.secrets.names(),
        *plane.proxy_tokens.keys(),
    ]


def deployed(plane: ModalPlane, *arguments: str, **environment: str) -> Any:
    """Deploy, insist that it worked, and return what it printed as JSON."""
    done = run(plane, *DEPLOY, *arguments, "--json", **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def actions(result: Any) -> dict[str, str]:
    """Return what was done with each app."""
    return {app["app"]: app["action"] for app in result["apps"]}


@dataclass(frozen=True)
class Account:
    """An account with a deployed service, the admin key of its first deploy, and the models file that it reads.

    Attributes:
        first: What the two deploys printed that ran at once in the empty account, and their errors.
        versions: Those of the apps after them.
    """

    plane: ModalPlane
    key: str
    models: Path
    first: tuple[tuple[Any, str], ...] = ()
    versions: tuple[tuple[str, int], ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        """The settings of its deploys."""
        return {"SERVICE_MODELS_FILE": str(self.models), "SERVICE_BUFFER_CONTAINERS": "1"}


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory, client_mount: Path) -> Iterator[Account]:
    """An account that was empty, after two deploys at once: one waits for the other, and finds nothing to do."""
    models = tmp_path_factory.mktemp("own") / "models.toml"
    models.write_text(MINE.format("a" * 40, 2048))
    with ModalPlane(tmp_path_factory.mktemp("account"), container=ContainerRuntime(client_path=client_mount)) as plane:
        account = Account(plane, "", models)
        line = (*DEPLOY, "--json")
        with started(plane, *line, **account.environment) as one, started(plane, *line, **account.environment) as other:
            outputs = [process.communicate(timeout=180) for process in (one, other)]
        assert [process.returncode for process in (one, other)] == [0, 0], outputs
        first = tuple((json.loads(out), err) for out, err in outputs)
        (key,) = [result["key"] for result, _ in first if result["key"]]
        yield replace(account, key=key, first=first, versions=tuple(versions(plane).items()))
        assert plane.failures == []
        assert plane.unknown_calls == []


def test_deploys_at_once_publish_each_app_once(account: Account) -> None:
    """The second waits for the first, and then finds nothing to do; one of them shows the one key."""
    assert sorted((len(result["published"]), bool(result["key"])) for result, _ in account.first) == [
        (0, False),
        (2, True),
    ]
    assert dict(account.versions) == {TIER: 1, GATEWAY: 1}
    assert len(account.plane.proxy_tokens.keys()) == 1


def test_deploy_sets_for_a_pool_what_modal_ignores_of_its_class(account: Account) -> None:
    """The least and the buffered replicas of pools with parameters; and an entry's own number beside one and those."""
    scaled = {}
    for request in account.plane.calls("FunctionUpdateSchedulingParams"):
        assert isinstance(request, pb.FunctionUpdateSchedulingParamsRequest)
        (pool,) = [pool for pool in account.plane.pools if pool.function.id == request.function_id]
        scaled[pool.parameters["model"]] = request.settings
    assert scaled == {
        "tiny": pb.AutoscalerSettings(min_containers=0, buffer_containers=1),
        "mine": pb.AutoscalerSettings(max_containers=4),
    }
    assert account.plane.function(TIER, "Server").autoscaler_settings.max_containers == 2


def test_deploy_again_is_a_no_op(account: Account) -> None:
    """It publishes nothing, makes nothing, shows no key, and asks the gateway with a key of the user."""
    plane = account.plane
    before, secrets = versions(plane), len(made(plane))
    result = deployed(plane, VLLM_API_KEY=account.key, **account.environment)
    assert actions(result) == {TIER: "keep", GATEWAY: "keep"}
    assert (result["key"], result["published"], result["secrets_made"]) == (None, [], [])
    assert {model["id"]: model["gpu"] for model in result["models"]} == {"llm": "L4", "tiny": "L4"}
    refused = run(plane, *DEPLOY, VLLM_API_KEY="sk-wrong", **account.environment)
    assert refused.returncode == 1
    assert "/v1/models answered 401" in refused.stderr
    assert "sk-wrong" not in refused.stderr
    assert (versions(plane), len(made(plane))) == (before, secrets)


def test_deploy_of_a_change_publishes_the_apps_that_read_it_and_a_rollback_undoes_it(account: Account) -> None:
    """An entry's engine fields concern its tier alone, a gateway's setting the gateway; prices are told before."""
    plane, environment = account.plane, account.environment
    account.models.write_text(MINE.format("b" * 40, 2048))
    dry = deployed(plane, "--dry-run", **environment)
    assert [(app["action"], app["changes"], app["costs_snapshots"]) for app in dry["apps"]] == [
        ("update", ["entries"], True),
        ("keep", [], False),
    ]
    assert (dry["dollars_per_hour_up"], dry["dollars_per_hour_idle"]) == (0.8, 0.0)
    plane.volumes["vllm-cache"].write(f"failures/{TIER}/mine.json", b"{}")
    assert deployed(plane, **environment)["published"] == [TIER]
    assert not [file for file in plane.volumes["vllm-cache"].files() if file.startswith("failures/")]
    assert deployed(plane, SERVICE_HOLD_S="90", **environment)["published"] == [GATEWAY]

    number = versions(plane)[GATEWAY]
    back = run(plane, *DEPLOY, "--rollback", **environment)
    assert back.returncode == 0, back.stderr
    assert back.stdout == f"{GATEWAY}: version {number} -> {number - 1}\n"
    same = deployed(plane, "--dry-run", SERVICE_MIN_CONTAINERS="1", **environment)
    assert actions(same) == {TIER: "update", GATEWAY: "keep"}
    assert same["dollars_per_hour_idle"] == 0.8


def test_deploy_retry_lets_what_cannot_boot_boot_again(account: Account) -> None:
    """Where nothing has changed too; it says what was recorded."""
    plane, environment = account.plane, account.environment
    volume, path = plane.volumes["vllm-cache"], f"failures/{TIER}/tiny.json"
    failure = {"at": time.time(), "model": "tiny", "gpu": "NVIDIA L4", "boot": "x", "reason": "CUDA out of memory."}
    volume.write(path, json.dumps(failure).encode())
    before = versions(plane)
    done = run(plane, *DEPLOY, "--retry", **environment)
    assert done.returncode == 0, done.stderr
    assert "tiny boots at its next request again. Recorded: CUDA out of memory." in " ".join(done.stderr.split())
    assert (path in volume.files(), versions(plane)) == (False, before)


def test_deploy_per_model_publishes_an_app_that_goes_before_the_tier(account: Account) -> None:
    """The gateway asks for it first; `list`, `url` and `stop` know it, and stopping it leaves the tier."""
    plane, environment = account.plane, account.environment
    asked = len(plane.calls("ClassGet"))
    result = deployed(plane, "--per-model", VLLM_API_KEY=account.key, **environment)
    assert result["published"] == [ALONE]
    assert plane.images.env(plane.function(ALONE, "Server").image_id)["SERVICE_MODEL"] == "tiny"
    asked_for = [request.app_name for request in plane.calls("ClassGet")[asked:]]  # type: ignore[attr-defined]
    assert ALONE in asked_for

    listed = json.loads(run(plane, "list", "--json", **environment).stdout)
    assert {row["app"]: row["gpu"] for row in listed} == {GATEWAY: None, TIER: "L4", ALONE: "L4"}
    assert (
        run(plane, "url", "tiny", **environment).stdout == f"{plane.url_of(ALONE, 'Server', 'serve')}/v1?model=tiny\n"
    )
    assert run(plane, "stop", "tiny", "--yes", **environment).stdout == f"{ALONE} is stopped\n"
    assert [plane.apps[name].is_deployed for name in (ALONE, TIER)] == [False, True]


Refuse = Callable[[ModalPlane], None]


def _put(name: str, **values: str) -> Refuse:
    return lambda plane: plane.secrets.put(name, values)


def _refuse(name: str, status: Status, text: str) -> Refuse:
    return lambda plane: plane.refuse(name, GRPCError(status, text))


REFUSED: dict[str, tuple[Refuse, list[str], dict[str, str], str, str]] = {
    "login": (
        _refuse("WorkspaceNameLookup", Status.UNAUTHENTICATED, "Token is invalid"),
        *([], {}),
        "Modal refused to open this account: this machine has no Modal token, or an invalid one.",
        "Run 'modal setup'",
    ),
    "environment": (
        *(lambda _: None, ["--env", "nowhere"], {}),
        "Modal has no environment 'nowhere' in this workspace.",
        "Make it: modal environment create nowhere.",
    ),
    "keys": (
        *(_put("vllm-api-key", OTHER="x"), [], {}),
        "Secret 'vllm-api-key' cannot be used: Secret 'vllm-api-key' is missing key(s): API_KEYS.",
        "Put it in: modal secret create --force vllm-api-key API_KEY=<key>.",
    ),
    "token": (
        *(_put("vllm-proxy-token", MODAL_KEY="wk-1"), [], {}),
        "Secret 'vllm-proxy-token' cannot be used: Secret 'vllm-proxy-token' is missing key(s): MODAL_SECRET.",
        "Put it in: modal secret create --force vllm-proxy-token MODAL_KEY=wk-",
    ),
    "webhook": (
        *(_put("team-webhook", URL="x"), [], {"SERVICE_WEBHOOK_SECRET": "team-webhook"}),
        "SERVICE_WEBHOOK_SECRET='team-webhook' cannot be used: Secret 'team-webhook' is missing key(s): WEBHOOK_URL.",
        "Create it: modal secret create team-webhook WEBHOOK_URL=https://",
    ),
    "new token": (
        _refuse("WebhookTokenCreate", Status.PERMISSION_DENIED, "Only owners may do that"),
        *([], {}),
        "Modal refused to create a proxy token: Only owners may do that.",
        "Ask an owner of the workspace",
    ),
    "gated": (
        *(lambda _: None, ["llama-3.1-8b"], {}),
        "A gated model needs Modal's secret 'huggingface', which is missing or has no HF_TOKEN:",
        "Create it: modal secret create huggingface HF_TOKEN=<token>.",
    ),
    "weights": (
        *(lambda _: None, ["qwen3-0.6b"], {}),
        "Qwen/Qwen3-0.6B at revision c1899de289a04d12100db370d81485cdf75e47ca cannot be fetched from http://127.0.0.1:9",
        "Check the connection;",
    ),
}


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory, client_mount: Path) -> Iterator[ModalPlane]:
    """An account in which nothing may be made."""
    no_hub = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    runtime = ContainerRuntime(client_path=client_mount, environment=no_hub)
    with ModalPlane(tmp_path_factory.mktemp("empty"), container=runtime) as plane:
        yield plane
        assert plane.unknown_calls == []


def test_doctor_on_an_empty_account_warns_of_what_a_deploy_makes(empty: ModalPlane) -> None:
    """Nothing has failed; the hub is not in reach here, which is a warning too."""
    found = diagnosed(empty, 0)
    assert found["account"][:2] == ("ok", "Workspace plane, environment main.")
    assert found["secrets"][:2] == ("warn", "Missing: vllm-proxy-token, vllm-api-key.")
    assert found["apps"] == ("warn", "Nothing of this service is deployed.", "Deploy: vllm-service deploy.")
    assert not {"gateway", "boots at Modal"} & set(found)
    assert {found[name][0] for name in ("machine", "settings", "boots")} == {"ok"}
    assert found["hub"][0] == "warn"


@pytest.mark.parametrize("prerequisite", REFUSED)
def test_deploy_without_a_prerequisite_says_so_and_makes_nothing(empty: ModalPlane, prerequisite: str) -> None:
    """One sentence and its hint; neither app, secret nor token is made."""
    arrange, arguments, environment, sentence, hint = REFUSED[prerequisite]
    arrange(empty)
    before = sorted(made(empty))
    done = run(empty, *DEPLOY, *arguments, **environment)
    error, advice = done.stderr.splitlines()[-2:]
    assert (done.returncode, done.stdout) == (1, "")
    assert error.startswith(f"error: {sentence}"), done.stderr
    assert advice.startswith(f"hint: {hint}"), done.stderr
    assert sorted(made(empty)) == before
    for name in ("WorkspaceNameLookup", "WebhookTokenCreate"):
        empty.refuse(name, None)
    for name in empty.secrets.names():
        empty.secrets.remove(name)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["qwen3-8"], "Unknown model 'qwen3-8'. Did you mean 'qwen3-8b'?"),
        (["--gpu", "A10:5"], "5 x A10 were requested; Modal attaches 1 to 4 A10 to one container."),
        (["gemma-3-27b", "--gpu", "L40S"], "Model 'gemma-3-27b' does not fit on L40S"),
        (["mine"], "Model 'mine': extra_args has '--max-num-sequences', which vLLM does not know."),
        (["--rollback", "--check"], "--rollback goes with none of --dry-run, --check and --retry."),
    ],
)
def test_deploy_of_wrong_input_asks_modal_nothing(
    empty: ModalPlane, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    """Exit code 2, before any call."""
    file = tmp_path / "models.toml"
    file.write_text('[models.mine]\nhub_id = "me/mine"\nextra_args = ["--max-num-sequences", "4"]\n')
    before = len(empty.transcript)
    done = run(empty, "deploy", *arguments, SERVICE_MODELS_FILE=str(file))
    assert (done.returncode, done.stdout, len(empty.transcript)) == (2, "", before), done.stderr
    assert done.stderr.splitlines()[-2].startswith(f"error: {sentence}"), done.stderr


def test_deploy_without_a_terminal_asks_for_yes_and_warns_of_endpoints_and_names(account: Account) -> None:
    """Nine endpoints are more than the free plan has; a platform's variable is ignored with a warning."""
    plane = account.plane
    before = versions(plane)
    names = ("tiny", "tiny-t4", "tiny-h100", "tiny-h200", "tiny-b200", "tiny-a100", "tiny-l40s", "tiny-a10")
    done = run(plane, "deploy", *names, SERVICE_FQDN_APP="x")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Ignored, because this service has no such settings: SERVICE_FQDN_APP." in done.stderr
    assert "Modal's free plan allows 8 web endpoints, and this environment will have 9" in done.stderr
    error, hint = done.stderr.splitlines()[-2:]
    assert error == "error: Nothing was deployed: standard input is no terminal on which this could be confirmed."
    assert hint == "hint: Add --yes."
    assert versions(plane) == before


def interrupted(plane: ModalPlane, moment: str) -> str:
    """Start a deploy, press Ctrl-C when the plane has seen that call, and return what was said."""
    seen = len(plane.calls(moment))
    with started(plane, *DEPLOY) as process:
        plane.wait_until(lambda: len(plane.calls(moment)) > seen, 60, moment)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "Stopped. What was finished is kept; the same command goes on from there."
    return err


def test_deploy_ended_again_and_again_is_completed_by_the_same_command(tmp_path: Path, client_mount: Path) -> None:
    """By Ctrl-C or refused by Modal; in the end there is one token, both secrets, one key that was shown, both apps."""
    with ModalPlane(tmp_path, container=ContainerRuntime(client_path=client_mount)) as plane:
        plane.proxy_tokens.scoped = True
        plane.refuse("WebhookTokenCreate", GRPCError(Status.UNAVAILABLE, "later"))  # no token of the first
        said = interrupted(plane, "DictUpdate")  # the lease is taken
        plane.refuse("WebhookTokenCreate", None)
        said += interrupted(plane, "WebhookTokenCreate")
        plane.refuse("AppPublish", GRPCError(Status.RESOURCE_EXHAUSTED, "Reached limit of 8 web endpoints"))
        refused = run(plane, *DEPLOY)
        assert (refused.returncode, refused.stdout) == (1, "")
        error, hint = refused.stderr.splitlines()[-2:]
        assert error.startswith("error: App 'vllm-l4' was not published: ")
        assert "Reached limit of 8 web endpoints" in error
        assert hint.startswith("hint: Nothing of it was changed.")
        assert versions(plane) == {}
        plane.refuse("AppPublish", None)
        said += refused.stderr + interrupted(plane, "MountGetOrCreate") + interrupted(plane, "AppPublish")

        (key,) = re.findall(r"shown once: (sk-\S+)", said)
        result = deployed(plane, VLLM_API_KEY=key)
        assert result["key"] is None
        assert {model["id"] for model in result["models"]} == {"llm", "tiny"}
        assert plane.proxy_tokens.allowed == plane.proxy_tokens.keys()
        assert len(plane.proxy_tokens.keys()) == 1
        assert set(versions(plane)) == {TIER, GATEWAY}
        assert plane.failures == []
