"""Settings: every field's bounds, the errors of wrong values, and the round trip through the environment."""

from __future__ import annotations

import pytest

from service.errors import SettingsError
from service.settings import Settings

# field -> values that are valid, as somebody writes them, with what they mean
VALID: dict[str, dict[str, object]] = {
    "app": {"vllm-h100": "vllm-h100", "A.b_c-9": "A.b_c-9", "x" * 64: "x" * 64},
    "model": {"qwen3-8b": "qwen3-8b", "Qwen/Qwen3-8B-FP8": "Qwen/Qwen3-8B-FP8"},
    "gpu": {
        **{"H100": "H100", "h100!": "H100!", "b200+": "B200+", "A10G": "A10"},
        **{"A100": "A100-80GB", "a100-80gb": "A100-80GB"},
    },
    "n_gpu": {"1": 1, "8": 8},
    "fast_boot": {"true": True, "false": False, "1": True, "0": False, "True": True, "False": False},
    "snapshot": {"off": "off", "cpu": "cpu", "gpu": "gpu"},
    "scaledown_window": {"2": 2, "3600": 3600},
    "min_containers": {"0": 0, "1000": 1000},
    "max_containers": {"1": 1, "1000": 1000},
    "max_gpus": {"1": 1, "1000": 1000},
    "max_dollars_per_day": {"1": 1, "1000000": 1000000},
    "buffer_containers": {"0": 0, "1000": 1000},
    "max_inputs": {"1": 1, "1000": 1000},
    "target_inputs": {"1": 1, "64": 64},
    "startup_timeout_s": {"10": 10, "86400": 86400},
    "hang_s": {"10": 10, "86400": 86400},
    "request_timeout_s": {"1": 1, "86400": 86400},
    "region": {"us": "us", "us-west": "us-west"},
    "direct_auth": {"proxy": "proxy", "keys": "keys"},
    "hold_s": {"0": 0, "3600": 3600},
    "max_held": {"1": 1, "100000": 100_000},
    "max_held_per_key": {"1": 1, "100000": 100_000},
    "max_n": {"1": 1, "200": 200},
    "keep_alive_s": {"2": 2, "3600": 3600},
    "models_file": {"~/models.toml": "~/models.toml"},
    "hub_secret": {"huggingface": "huggingface"},
    "keys_secret": {"team-keys": "team-keys"},
    "webhook_secret": {"team-webhook": "team-webhook"},
    "volume_prefix": {"team-a-": "team-a-", "A.b_c-9": "A.b_c-9", "x" * 40: "x" * 40},
    "cors_origins": {
        **{text: text for text in ("*", "https://a.example", "http://localhost:3000,https://a.example:8443")},
        **{text: text for text in ("http://[::1]:3000 , app://obsidian.md", "chrome-extension://abc")},
    },
    "allowed_hosts": {text: text for text in ("llm.example", "llm, 10.0.0.7", "::1", "[fd00::7],llm")},
    "port": {"1": 1, "65535": 65535},
}
# field -> values that are refused, and words of what is expected instead
WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "app": (("a b", "x" * 65, "a/b"), ""),
    "gpu": (("H1000", "cpu"), "Modal offers"),
    "n_gpu": (("0", "9", "two", "1.5"), "a whole number from 1 to 8"),
    "fast_boot": (("maybe", "2"), "a switch (true or false)"),
    "snapshot": (("tpu", "GPU"), "one of off, cpu, gpu"),
    "scaledown_window": (("1", "3601", "soon"), "a whole number from 2 to 3600"),
    "min_containers": (("-1", "1001"), "a whole number from 0 to 1000"),
    "max_containers": (("0", "1001"), "a whole number from 1 to 1000"),
    "max_gpus": (("0", "1001", "1.5"), "a whole number from 1 to 1000"),
    "max_dollars_per_day": (("0", "1000001", "$20"), "a whole number from 1 to 1000000"),
    "buffer_containers": (("-1", "1001"), "a whole number from 0 to 1000"),
    "max_inputs": (("0", "1001"), "a whole number from 1 to 1000"),
    "target_inputs": (("0", "1001"), "a whole number from 1 to 1000"),
    "startup_timeout_s": (("9", "86401"), "a whole number from 10 to 86400"),
    "hang_s": (("9", "86401", "never"), "a whole number from 10 to 86400"),
    "request_timeout_s": (("0", "86401"), "a whole number from 1 to 86400"),
    "region": (("u",), ""),
    "direct_auth": (("none", "Proxy"), "one of proxy, keys"),
    "hold_s": (("-1", "3601"), "a whole number from 0 to 3600"),
    "max_held": (("0", "100001", "all"), "a whole number from 1 to 100000"),
    "max_held_per_key": (("0", "100001"), "a whole number from 1 to 100000"),
    "max_n": (("0", "201", "1.5"), "a whole number from 1 to 200"),
    "keep_alive_s": (("1", "3601"), "a whole number from 2 to 3600"),
    "volume_prefix": (("a b", "x" * 41, "a/b"), "1 to 40 letters, digits, dots, dashes and underscores"),
    "cors_origins": (
        (
            "a.example",
            "https://a.example/",
            "https://a.example,",
            "*, https://a.example",
            "null",
            "https://*.a.example",
        ),
        "a list of origins such as https://app.example.com",
    ),
    "allowed_hosts": (
        ("llm.example:80", "https://llm", "a b", "*"),
        "a list of host names or addresses without a port",
    ),
    "port": (("0", "65536", "http"), "a whole number from 1 to 65535"),
}
ANY_TEXT = {"webhook_secret", "model", "models_file", "hub_secret", "keys_secret"}


def load(**fields: str) -> Settings:
    """Load settings from these fields, written as variables."""
    return Settings.load({f"SERVICE_{name.upper()}": value for name, value in fields.items()})


def refusal(**fields: str) -> str:
    """Return the error of these fields."""
    with pytest.raises(SettingsError) as caught:
        load(**fields)
    return str(caught.value)


def test_settings_tables_here_cover_every_field() -> None:
    """A field that is added needs its bounds tested too."""
    fields = set(Settings.model_fields)
    assert set(VALID) == fields
    assert set(WRONG) | ANY_TEXT == fields


@pytest.mark.parametrize(
    ("field", "text", "meant"), [(field, text, meant) for field, row in VALID.items() for text, meant in row.items()]
)
def test_settings_at_its_bounds_is_accepted(field: str, text: str, meant: object) -> None:
    """Both ends of every range are valid, and GPU names take Modal's spelling."""
    assert getattr(load(**{field: text}), field) == meant


@pytest.mark.parametrize(
    ("field", "text", "expected"),
    [(field, text, expected) for field, (texts, expected) in WRONG.items() for text in texts],
)
def test_settings_with_a_wrong_value_names_variable_value_and_range(field: str, text: str, expected: str) -> None:
    """The error names the variable, the value and the valid range."""
    sentence = refusal(**{field: text})

    assert f"SERVICE_{field.upper()}" in sentence
    assert f"'{text}'" in sentence
    assert expected in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("field", sorted(WRONG))
def test_settings_with_a_wrong_value_shows_no_python(field: str) -> None:
    """Users read these errors: they contain no class name of a library."""
    sentence = refusal(**{field: WRONG[field][0][0]})

    for jargon in ("Metadata", "metadata", "MinLen", "pattern=", "pydantic", "NoneType", "input_value"):
        assert jargon not in sentence


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("SERVICE_GPUS", "SERVICE_GPU"),
        ("SERVICE_SCALE_DOWNWINDOW", "SERVICE_SCALEDOWN_WINDOW"),
        ("SERVICE_MODLE", "SERVICE_MODEL"),
        ("SERVICE_port", "SERVICE_PORT"),
    ],
)
def test_settings_with_an_unknown_name_offers_the_nearest(name: str, nearest: str) -> None:
    """A typo must not silently deploy the default."""
    with pytest.raises(SettingsError) as caught:
        Settings.load({name: "x"})

    assert str(caught.value).startswith(f"{name} is not a setting of this service. Did you mean '{nearest}'?")
    assert "Known: SERVICE_ALLOWED_HOSTS, SERVICE_APP, " in str(caught.value)


def test_settings_with_an_unknown_name_and_no_value_is_refused() -> None:
    """An empty typo is a typo."""
    with pytest.raises(SettingsError, match="SERVICE_GPUS"):
        Settings.load({"SERVICE_GPUS": ""})


def test_settings_that_are_wrong_are_all_in_one_error() -> None:
    """Names, values and contradictions: three typos must not cost three deploys."""
    given = {"SERVICE_GPUS": "2", "SERVICE_PORT": "http", "SERVICE_GPU": "H1000", "SERVICE_HOLD_S": "2m"}
    with pytest.raises(SettingsError) as caught:
        Settings.load(given)

    for words in ("SERVICE_GPUS is not", "SERVICE_PORT='http'", "SERVICE_GPU: Unknown GPU 'H1000'", "SERVICE_HOLD_S="):
        assert words in caught.value.message
    for words in ("Did you mean 'SERVICE_GPU'?", "Did you mean 'H100'?", "Write SERVICE_HOLD_S=120."):
        assert words in caught.value.hint


def typos(name: str) -> set[str]:
    """Return every name that one deletion, insertion, substitution or swap of neighbours makes of this one."""
    ends = [(name[:place], name[place:]) for place in range(len(name) + 1)]
    made = {a + b[1:] for a, b in ends if b} | {a + b[1] + b[0] + b[2:] for a, b in ends if len(b) > 1}
    for letter in "AEX_1":
        made |= {a + letter + b for a, b in ends} | {a + letter + b[1:] for a, b in ends if b}
    return made


@pytest.mark.parametrize("field", sorted(Settings.model_fields))
def test_settings_with_any_single_typo_of_a_name_are_refused(field: str) -> None:
    """A deleted, inserted, replaced or swapped character, wherever it is."""
    known = {f"SERVICE_{other.upper()}" for other in Settings.model_fields}
    for typo in {f"SERVICE_{name}" for name in typos(field.upper())} - known:
        with pytest.raises(SettingsError, match=f"{typo} is not a setting"):
            Settings.load({typo: "1"})


PLATFORM_NAMES = [
    *("SERVICE_FQDN_APP", "SERVICE_FQDN_APP_3000", "SERVICE_URL_APP", "SERVICE_USER_ADMIN", "SERVICE_PASSWORD_DB"),
    *("SERVICE_PASSWORD_64_APP", "SERVICE_BASE64_KEY", "SERVICE_REALBASE64_APP", "SERVICE_NAME_APP"),  # Coolify
    *("SERVICE_SERVICE_HOST", "SERVICE_SERVICE_PORT", "SERVICE_SERVICE_PORT_HTTP", "SERVICE_PORT_8000_TCP"),
    *("SERVICE_PORT_8000_TCP_ADDR", "SERVICE_PORT_8000_TCP_PORT", "SERVICE_PORT_8000_TCP_PROTO"),  # Kubernetes
    *("SERVICE_NAME", "SERVICE_HOST", "SERVICE_ID", "SERVICE_VERSION", "SERVICE_TAGS", "SERVICE_8000_NAME"),
]  # fmt: skip


@pytest.mark.parametrize("name", PLATFORM_NAMES)
def test_settings_of_a_platform_are_ignored_with_one_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Coolify, Kubernetes, Consul and OpenTelemetry set such variables in every container."""
    assert Settings.load({name: "x", "SERVICE_URL_WEB_3000": "y", "SERVICE_GPU": "L4"}) == load(gpu="L4")

    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert {name, "SERVICE_URL_WEB_3000"} <= set(record.getMessage().rstrip(".").replace(",", "").split())


def test_settings_with_the_port_of_kubernetes_take_the_default_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """A Service that is named `service` sets SERVICE_PORT in every pod."""
    assert load(port="tcp://10.0.0.1:8000", gpu="L4") == load(gpu="L4")

    (record,) = caplog.records
    assert "SERVICE_PORT=tcp://10.0.0.1:8000 counts as unset" in record.getMessage()
    assert "enableServiceLinks: false" in record.getMessage()


def test_settings_of_others_are_ignored() -> None:
    """Only the prefix `SERVICE_` is ours."""
    assert Settings.load({"MY_SERVICE_GPU": "x", "service_gpu": "x", "PATH": "x"}) == Settings()


@pytest.mark.parametrize("field", sorted(Settings.model_fields))
def test_settings_with_an_empty_value_takes_the_default(field: str) -> None:
    """`SERVICE_X= make serve` unsets a variable for one command."""
    assert load(**{field: ""}) == Settings()


@pytest.mark.parametrize(
    ("field", "text", "meant"), [(field, text, meant) for field, row in VALID.items() for text, meant in row.items()]
)
def test_settings_survive_the_round_trip_through_the_environment(field: str, text: str, meant: object) -> None:
    """The image carries them as variables; the container must read the same."""
    settings = load(**{field: text})

    assert Settings.load(settings.to_env()) == settings


def test_settings_to_env_leaves_out_what_is_unset() -> None:
    """A None stays a None: the registry's entry fills it on both sides."""
    env = Settings().to_env()

    assert not {"SERVICE_GPU", "SERVICE_FAST_BOOT"} & set(env)
    assert all(isinstance(value, str) and value for value in env.values())


@pytest.mark.parametrize(
    ("field", "text", "seconds"),
    [
        ("scaledown_window", "2m", 120),
        ("startup_timeout_s", "20h", 72000),
        ("hold_s", "90s", 90),
        ("hang_s", "5m", 300),
    ],
)
def test_settings_with_a_duration_offers_its_seconds(field: str, text: str, seconds: int) -> None:
    """`2m` gets the number of seconds to write."""
    assert refusal(**{field: text}).endswith(f" Write SERVICE_{field.upper()}={seconds}.")


@pytest.mark.parametrize(("field", "text"), [("hold_s", "2h"), ("startup_timeout_s", "5s"), ("port", "2m")])
def test_settings_with_a_duration_outside_the_range_offers_none(field: str, text: str) -> None:
    """A number that is out of range is not offered."""
    assert "write" not in refusal(**{field: text}).lower()


@pytest.mark.parametrize("text", ["²m", "m", "s", "-2m", "1.5h"])
def test_settings_with_what_only_resembles_a_duration_is_refused(text: str) -> None:
    """The hint must not fail on what it cannot parse."""
    assert "a whole number from 0 to 3600" in refusal(hold_s=text)


def test_settings_with_a_count_behind_the_gpu_names_both_variables() -> None:
    """Modal's own spelling `H100:2` is two settings here."""
    assert "SERVICE_GPU=H100 SERVICE_N_GPU=2" in refusal(gpu="H100:2")


def test_settings_with_more_gpus_than_a_container_holds_is_refused() -> None:
    """Modal attaches at most four A10 to a container."""
    sentence = refusal(gpu="A10", n_gpu="5")

    assert "SERVICE_N_GPU" in sentence
    assert "5 x A10" in sentence
    assert "1 to 4" in sentence


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_inputs": "65"}, ("SERVICE_TARGET_INPUTS=65", "SERVICE_MAX_INPUTS=64")),
        ({"min_containers": "2", "max_containers": "1"}, ("SERVICE_MIN_CONTAINERS=2", "SERVICE_MAX_CONTAINERS=1")),
    ],
)
def test_settings_that_contradict_each_other_are_refused_with_both_names(
    fields: dict[str, str], words: tuple[str, str]
) -> None:
    """Each is valid alone; together they make no sense."""
    sentence = refusal(**fields)

    assert all(word in sentence for word in words)


def test_settings_cannot_be_changed() -> None:
    """They are resolved once."""
    with pytest.raises(ValueError, match="frozen"):
        Settings().port = 1  # type: ignore[misc]


def test_settings_defaults_are_the_contract() -> None:
    """The README documents them."""
    settings = Settings.load({})

    assert (settings.model, settings.port, settings.hang_s) == ("qwen3-8b", 8000, 180)
    assert (settings.snapshot, settings.fast_boot) == ("cpu", None)  # which depends on the first
    assert (settings.direct_auth, settings.keys_secret) == ("proxy", "vllm-api-key")
    assert (settings.gpu, settings.n_gpu, settings.app, settings.hub_secret) == (None,) * 4
