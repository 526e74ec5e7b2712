"""`vllm-service keys`: makes, lists, ends and limits the keys of API clients. Parse and call, no more."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from service.cli import cloud, completion

app = typer.Typer(
    help="Make, list, end and limit the keys of API clients.", no_args_is_help=True, rich_markup_mode=None
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Whose key: a person, a team, a program.")]
Modal = Annotated[bool, typer.Option("--modal", help="Of the deployed service (admin key in VLLM_API_KEY).")]
Url = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help="Of this gateway, likewise.", callback=cloud.not_empty),
]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", metavar="M", help="May use it; repeatable. 'all': all.", autocompletion=completion.models),
]
Requests = Annotated[int | None, typer.Option("--requests-per-minute", min=0, metavar="N", help="0: no limit.")]
MinuteTokens = Annotated[int | None, typer.Option("--tokens-per-minute", min=0, metavar="N", help="Prompt and answer.")]
DayTokens = Annotated[int | None, typer.Option("--tokens-per-day", min=0, metavar="N", help="Of a day in UTC.")]
Dollars = Annotated[float | None, typer.Option("--dollars-per-month", min=0, metavar="X", help="Of a month in UTC.")]
Concurrency = Annotated[int | None, typer.Option("--concurrency", min=0, metavar="N", help="Requests at once.")]
Expires = Annotated[
    str | None,
    typer.Option("--expires", metavar="WHEN", help="A date, or such as 30d. 'never'.", callback=cloud.not_empty),
]
Admin = Annotated[bool | None, typer.Option("--admin/--no-admin", help="May change keys and see all usage.")]


@app.command(
    "limit",
    help="Change limits of a name; those that are not given stay.",
    epilog="Example: vllm-service keys limit alice --tokens-per-day 1000000 --modal",
)
@app.command(
    "new",
    help="Make a key, and print it this once: only its digest is kept.",
    epilog="Example: vllm-service keys new alice --requests-per-minute 60 --modal",
)
def new_or_limit(  # noqa: PLR0917 - every one is an option with a name
    context: typer.Context,
    name: Name,
    models: Models = None,
    requests_per_minute: Requests = None,
    tokens_per_minute: MinuteTokens = None,
    tokens_per_day: DayTokens = None,
    dollars_per_month: Dollars = None,
    concurrency: Concurrency = None,
    expires: Expires = None,
    admin: Admin = None,
    modal: Modal = False,
    url: Url = None,
    as_json: cloud.Json = False,
    env: cloud.Env = None,
) -> None:
    """Make a key with limits, or change the limits of a name: two words with the same options."""
    from service.errors import UsageError

    given = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "tokens_per_day": tokens_per_day,
        "dollars_per_month": dollars_per_month,
        "concurrency": concurrency,
    }
    word, limits = str(context.info_name), _limits(given, models, expires, admin)
    if word == "limit" and not limits:
        raise UsageError("No limit was given.", hint="'vllm-service keys limit --help' lists them; 0 lifts one.")
    _change(word, name, limits, modal, url, env, as_json)


@app.command("list", epilog="Example: vllm-service keys list --modal --json")
def list_keys(modal: Modal = False, url: Url = None, as_json: cloud.Json = False, env: cloud.Env = None) -> None:
    """List all keys by name, with their limits; never a key itself."""
    from service.cli.terminal import print_json, print_table

    with cloud.modal_word(env):
        records = _place(modal, url, env).records()
    if as_json:
        print_json({"keys": records})
        return
    if not records:
        typer.echo("No key has been made here. Make one: vllm-service keys new NAME", err=True)
        return
    rows = [(one["name"], one["state"], str(len(one["keys"])), _limits_text(one["limits"])) for one in records]
    print_table(("name", "state", "keys", "limits"), rows, right=("keys",))


@app.command(epilog="Example: vllm-service keys revoke alice --modal")
def revoke(
    name: Name, modal: Modal = False, url: Url = None, as_json: cloud.Json = False, env: cloud.Env = None
) -> None:
    """End all keys of a name, within seconds."""
    _change("revoke", name, {}, modal, url, env, as_json)


@app.command(epilog="Example: vllm-service keys rotate alice --grace 7d --modal")
def rotate(  # noqa: PLR0917 - every one is an option with a name
    name: Name,
    grace: Annotated[str, typer.Option(metavar="SPAN", help="How long the old key stays valid.")] = "24h",
    modal: Modal = False,
    url: Url = None,
    as_json: cloud.Json = False,
    env: cloud.Env = None,
) -> None:
    """Make another key of a name; the old one stays valid for a while."""
    from service.usage.limits import parse_span

    _change("rotate", name, {"grace_s": parse_span(grace)}, modal, url, env, as_json)


def _limits(
    given: dict[str, Any], models: list[str] | None, expires: str | None, admin: bool | None
) -> dict[str, object]:
    """Return the limits that were given, as the routes for operators take them; None lifts one."""
    found: dict[str, object] = {name: value or None for name, value in given.items() if value is not None}
    if models:
        found["models"] = _models(models)
    if expires:
        found["expires"] = None if expires == "never" else _time(expires)
    if admin is not None:
        found["admin"] = admin
    return found


def _models(names: list[str]) -> list[str] | None:
    from service.errors import UsageError

    if "all" in names and {*names} != {"all"}:
        raise UsageError(
            f"--model {' --model '.join(names)}: 'all' goes with no other.", hint="Give 'all', or the others."
        )
    if not all(map(str.strip, names)):
        raise UsageError(
            "--model '' is empty; expected the name of a model.", hint="'vllm-service models' lists them; 'all' is all."
        )
    return None if "all" in names else names


def _time(text: str) -> str:
    import time

    from service.errors import UsageError
    from service.usage.limits import parse_span, parse_time, utc_text

    try:
        return utc_text(time.time() + parse_span(text))
    except UsageError:
        parse_time(text)
        return text


def _change(  # noqa: PLR0917 - the options that all words have
    word: str, name: str, fields: dict[str, object], modal: bool, url: str | None, env: str | None, as_json: bool
) -> None:
    import sys

    from service.cli import streams
    from service.cli.terminal import print_json
    from service.errors import ServiceError

    if word in {"new", "rotate"} and not streams.has_output():
        raise ServiceError(
            "Standard output is closed, and the key is shown there this once: nothing was changed.",
            hint="Run it with a standard output, such as a terminal or a file.",
        )
    with cloud.modal_word(env):
        record = _place(modal, url, env).change(word, name, fields)
    key = record.get("key")
    try:
        if as_json:
            print_json(record)
        elif key:
            typer.echo(key)
        sys.stdout.flush()
    except OSError as error:
        if not key or not streams.is_of_output(error):
            raise
        streams.drop_output()
        again = _rotation(name, fields.get("grace_s"), modal, url, env)
        raise ServiceError(
            f"The key of '{name}' was made and could not be shown: {error.strerror}.", hint=f"Make another: {again}"
        ) from error
    if as_json:
        return
    if key:
        typer.echo(f"The key of '{name}': it is shown this once, since only its digest is kept.", err=True)
        if ending := [one["ends"] for one in record["keys"] if one["ends"]]:
            typer.echo(f"The one before it is valid until {max(ending)}.", err=True)
    elif word == "revoke":
        typer.echo(f"The keys of '{name}' are revoked; a service refuses them within seconds.", err=True)
    else:
        typer.echo(f"{name}: {_limits_text(record['limits']) or 'no limits'}", err=True)


def _rotation(name: str, grace_s: object, modal: bool, url: str | None, env: str | None) -> str:
    """Return the command that replaces a key which nobody has seen; one before it stays valid as long as was asked."""
    import shlex

    options = [*(["--modal"] if modal else []), *(["--url", url] if url else []), *(["--env", env] if env else [])]
    return shlex.join(["vllm-service", "keys", "rotate", name, "--grace", f"{grace_s}s" if grace_s else "0", *options])


class _LocalKeys:
    """The keys of this machine, or of the database that SERVICE_DATABASE_URL names, as a gateway's routes have them."""

    def __init__(self) -> None:
        from service.keys import digests
        from service.settings import database_url
        from service.usage.key_records import database_keys
        from service.usage.keys import Keys

        names = {*digests(os.environ).values()}
        self._keys = Keys(database_keys(database_url(os.environ)), lambda: names)

    def records(self) -> list[dict[str, Any]]:
        import time

        return [record.to_fields(time.time()) for record in self._keys.records()]

    def change(self, word: str, name: str, fields: dict[str, Any]) -> dict[str, Any]:
        import time

        keys, more = self._keys, {}
        _check_models(fields.get("models") or ())
        match word:
            case "new":
                record, more["key"] = keys.new(name, fields)
            case "rotate":
                record, more["key"] = keys.rotate(name, **fields)
            case "revoke":
                record = keys.revoke(name)
            case _:
                record = keys.limit(name, fields)
        return {**record.to_fields(time.time()), **more}


def _check_models(names: Iterable[str]) -> None:
    """Refuse names that no model of this machine has; `up` serves also hub ids and directories that have no entry."""
    from service.gateway.key_set import KeySource
    from service.local.adapter_file import with_kept_adapters
    from service.registry.models import looks_like_a_source
    from service.settings import Settings
    from service.usage.limits import KeyLimits
    from service.weights import revisions

    entries = [name for name in names if not looks_like_a_source(name)]
    if entries:
        settings = Settings.load()
        registry = with_kept_adapters(revisions.registry(settings.models_file))
        KeySource({}, {}, None, settings.model).check_models(KeyLimits(models=entries), registry)


def _place(modal: bool, url: str | None, env: str | None) -> Any:
    """Return whose keys are meant: those of this machine, of the deployed service, or of a gateway elsewhere."""
    if not cloud.is_meant(modal, env, url) and not url:
        return _LocalKeys()
    from service.modal_app.gateway_access import api_key, base_url
    from service.usage.remote_keys import RemoteKeys

    return RemoteKeys(base_url(url or cloud.deployed_gateway()), api_key())


def _limits_text(limits: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {' '.join(value) if isinstance(value, list) else value}" for name, value in limits.items()
    )
