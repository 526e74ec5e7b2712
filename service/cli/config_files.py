"""Changes of other programs' configuration files: merged into what is there, asked for, with a backup.

Nothing that was there is lost: keys that are not ours stay, and a copy of the file as it was stays beside it.
"""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit
import yaml
from tomlkit.exceptions import TOMLKitError

from service.cli.terminal import confirm
from service.errors import ServiceError, one_line
from service.files import atomic_write

_PRIVATE = 0o600
_DOTENV = re.compile(r"(?P<export>\s*(?:export\s+)?)(?P<name>[A-Za-z_][A-Za-z0-9_]*)\s*=")


@dataclass(frozen=True)
class Change:
    """What is to become of a file.

    Attributes:
        file: The file itself, behind all symbolic links.
        before: Its text; None: it does not exist.
        names: What is set or removed, such as `model_providers.vllm.base_url`; empty: nothing.
        has_secret: The new text has a key in it.
    """

    file: Path
    before: str | None
    after: str
    names: tuple[str, ...]
    has_secret: bool = False

    @property
    def is_needed(self) -> bool:
        """Whether anything changes, the file's mode included."""
        return self.before != self.after or (self.has_secret and bool(self.file.stat().st_mode & 0o077))

    def write(self) -> Path | None:
        """Write the file, for its owner alone where it is new or has a key; return the backup of what was there.

        Raises:
            ServiceError: The file or its backup cannot be written.
        """
        backup = None
        try:
            mode = _PRIVATE
            if self.before is not None:
                mode = _PRIVATE if self.has_secret else self.file.stat().st_mode & 0o777
                backup = _unused(self.file)
                atomic_write(backup, self.file.read_bytes(), mode)
            atomic_write(self.file, self.after.encode(), mode)
        except OSError as error:
            raise _unusable(self.file, "written", error) from error
        return backup


def settle(change: Change, *, yes: bool) -> Path | None:
    """Write a change, after a question where the file is there already; return the backup.

    Raises:
        UsageError: Nobody can be asked.
        ServiceError: The answer was no, or the file cannot be written.
    """
    if not change.is_needed:
        return None
    if change.before is not None and not yes:
        names = ", ".join(change.names) or "who may read it"
        known = f"{change.file} is there.\nThis changes in it: {names}"
        confirm(f"{known}\nWrite it, and keep a copy of it as it was", "Nothing was written")
    return change.write()


def plan(file: Path, merge: Callable[[str], str], load: Callable[[str], Any], *, has_secret: bool = False) -> Change:
    """Return the change of a file; one that says the same as before is none.

    Args:
        file: Need not exist.
        merge: Returns the new text; it gets the old one, empty where there is none.
        load: Returns what a text says.
        has_secret: The new text has a key in it.

    Raises:
        ServiceError: The file cannot be read, or not be understood.
    """
    try:
        file = file.resolve()
        before = file.read_text("utf-8") if file.exists() else None
        if not isinstance(said := load(before or ""), Mapping):
            raise _not_understood(file, f"it holds {type(said).__name__} in place of an object")
        after = merge(before or "")
        after.encode()  # a JSON string may have half a character: \ud800
        changed = tuple(_differences(said, load(after)))
    except OSError as error:
        raise _unusable(file, "read", error) from error
    except RecursionError as error:
        raise _not_understood(file, "it is nested too deep") from error
    except RuntimeError as error:  # pathlib's
        raise ServiceError(
            f"'{file}' is a loop of symbolic links.", hint="Name another file: --output FILE."
        ) from error
    except (ValueError, TOMLKitError, yaml.YAMLError) as error:
        raise _not_understood(file, one_line(error)) from error
    return Change(file, before, after if changed or before is None else before, changed, has_secret)


def merged_toml(text: str, wanted: Mapping[str, Any]) -> str:
    """Return a TOML document with these values; comments and order of the others stay."""
    document = tomlkit.parse(text)
    _merge(document, wanted, tomlkit.table)
    return tomlkit.dumps(document)


def merged_json(text: str, wanted: Mapping[str, Any]) -> str:
    """Return a JSON object with these values."""
    document = load_json(text)
    _merge(document, wanted, dict)
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def merged_dotenv(text: str, wanted: Mapping[str, str]) -> str:
    """Return `NAME=value` lines with these values; each replaces the line that has set it, but for its `export`."""
    left, lines = dict(wanted), []
    for line in text.splitlines():
        match = _DOTENV.match(line)
        if not match or match["name"] not in wanted:
            lines.append(line)
        elif (name := match["name"]) in left:
            lines.append(f"{match['export']}{name}={shlex.quote(left.pop(name))}")
    return "\n".join([*lines, *(f"{name}={shlex.quote(value)}" for name, value in left.items())]) + "\n"


def load_toml(text: str) -> Any:
    """Return what a TOML document says."""
    return tomlkit.parse(text).unwrap()


def load_json(text: str) -> Any:
    """Return what a JSON document says; an empty one says nothing."""
    return json.loads(text) if text.strip() else {}


def load_yaml(text: str) -> Any:
    """Return what a YAML document says; an empty one says nothing.

    Raises:
        ValueError: It is none. The library's own error repeats a line, which may have a key.
    """
    try:
        return yaml.safe_load(text) or {}
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"line {line}: {error.problem}") from None


def yaml_comment_line(text: str) -> int | None:
    """Return the number of the first line with a comment; None: there is none.

    Raises:
        yaml.YAMLError: It is no YAML.
    """
    left = list(text)
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        if isinstance(token, yaml.ScalarToken):
            first, last = token.start_mark.index, token.end_mark.index
            if token.style in {"|", ">"}:  # a comment may follow the sign
                first = text.index("\n", first)
            left[first:last] = re.sub("#", " ", text[first:last])
    before, sign, _ = "".join(left).partition("#")
    return before.count("\n") + 1 if sign else None


def load_dotenv(text: str) -> Any:
    """Return the lines of `NAME=value` by name."""
    return {match["name"]: line for line in text.splitlines() if (match := _DOTENV.match(line))}


def merge_mappings(document: MutableMapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Set values in a document, mapping by mapping."""
    _merge(document, wanted, dict)


def _merge(
    document: MutableMapping[str, Any], wanted: Mapping[str, Any], new: Callable[[], MutableMapping[str, Any]]
) -> None:
    """Set values in a document; None removes one."""
    for name, value in wanted.items():
        if value is None:
            document.pop(name, None)
        elif isinstance(value, Mapping):
            if not isinstance(document.get(name), MutableMapping):
                document[name] = new()
            _merge(document[name], value, new)
        elif document.get(name) != value:
            document[name] = value


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], within: str = "") -> Iterator[str]:
    for name in dict.fromkeys([*before, *after]):
        one, other = before.get(name), after.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differences(one, other, f"{within}{name}.")
        elif one != other:
            yield f"{within}{name}"


def _not_understood(file: Path, why: str) -> ServiceError:
    return ServiceError(
        f"'{file}' cannot be changed, since it is not understood: {why}.",
        hint="Correct it, or add by hand what --print shows.",
    )


def _unused(file: Path) -> Path:
    stamp, number = time.strftime("%Y%m%d-%H%M%S"), 1
    backup = file.with_name(f"{file.name}.backup-{stamp}")
    while backup.exists():
        number += 1
        backup = file.with_name(f"{file.name}.backup-{stamp}-{number}")
    return backup


def _unusable(file: Path, how: str, error: OSError) -> ServiceError:
    return ServiceError(
        f"'{file}' cannot be {how}: {error.strerror}.",
        hint="Name a file in a directory that you may write to: --output FILE.",
    )
