"""What the user has told pip, told to uv: uv reads neither pip's variables nor its configuration files.

So a machine on which pip reaches its packages through a mirror, a proxy or a directory builds the engine's environment
through them too. A variable of uv's own goes before.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from service.files import expand_user

HTTP_TIMEOUT_S = 300  # uv's own 30 s are too short for a wheel of 1 GB that a mirror fetches first

# pip's option -> the variable that takes it, and those with which the user has answered already.
_VARIABLES = {
    "index-url": ("UV_DEFAULT_INDEX", ("UV_INDEX_URL",)),
    "extra-index-url": ("UV_INDEX", ("UV_EXTRA_INDEX_URL",)),
    "trusted-host": ("UV_INSECURE_HOST", ()),
    "find-links": ("UV_FIND_LINKS", ()),
    "cert": ("SSL_CERT_FILE", ("SSL_CERT_DIR", "UV_SYSTEM_CERTS", "UV_NATIVE_TLS")),
    "client-cert": ("SSL_CLIENT_CERT", ()),
    "proxy": ("ALL_PROXY", ("all_proxy", "HTTPS_PROXY", "https_proxy")),
}
_INDEXES = ("index-url", "extra-index-url")
_TIMEOUTS = {"UV_HTTP_TIMEOUT", "UV_REQUEST_TIMEOUT", "HTTP_TIMEOUT"}
_SECTIONS = ("global", "install", ":env:")  # of pip's options, the later ones before the earlier


@dataclass(frozen=True)
class UvSettings:
    """What uv is to be given: variables, and options of `uv pip install`."""

    env: Mapping[str, str]
    options: tuple[str, ...] = ()


def uv_settings(environ: Mapping[str, str] = os.environ) -> UvSettings:
    """Return how uv reaches packages where pip reaches them; starts pip once."""
    pip = _pip_options(environ)
    env = {"UV_HTTP_TIMEOUT": str(HTTP_TIMEOUT_S)} if not environ.keys() & _TIMEOUTS else {}
    uv_has_indexes = any("index" in file.read_text(errors="replace") for file in _uv_files(environ))
    for option, (variable, others) in _VARIABLES.items():
        if option in pip and not environ.keys() & {variable, *others} and not (option in _INDEXES and uv_has_indexes):
            env[variable] = (",".join if variable == "UV_FIND_LINKS" else " ".join)(pip[option].split())
    if "UV_INDEX" in env:
        # pip takes equal files from its main index; uv, of a version that several have, from the first that it is given
        env["UV_INDEX"] = f"{_main_index({**environ, **env})} {env['UV_INDEX']}".strip()
        if "UV_INDEX_STRATEGY" not in environ:
            env["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # all indexes, as pip does; locks pin hashes
    return UvSettings(env, ("--no-index",) if pip.get("no-index", "").lower() in {"1", "true", "yes", "on"} else ())


def _pip_options(environ: Mapping[str, str]) -> dict[str, str]:
    """Return pip's options by their long names, of its variables and all its configuration files.

    An environment that uv made, as `uvx` does, has no pip of its own: then the one on the PATH is asked.
    """
    pip = [sys.executable, "-P", "-m", "pip"]
    if importlib.util.find_spec("pip") is None:
        pip = [program for name in ("pip3", "pip") if (program := shutil.which(name, path=environ.get("PATH")))][:1]
    if not pip:
        return {}
    listed = subprocess.run(
        [*pip, "config", "list"], env=dict(environ), capture_output=True, text=True, check=False
    ).stdout
    found: dict[str, dict[str, str]] = {section: {} for section in _SECTIONS}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if section in found:
            found[section][option] = ast.literal_eval(value)
    return {option: value for section in _SECTIONS for option, value in found[section].items()}


def _main_index(environ: Mapping[str, str]) -> str:
    """Return the index that uv uses beside all others; where no variable names one, uv is started to tell its own."""
    if named := environ.get("UV_DEFAULT_INDEX") or environ.get("UV_INDEX_URL"):
        return named
    command = [sys.executable, "-P", "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--emit-index-url", "-"]
    told = subprocess.run(
        command, input="", env=dict(environ), cwd="/", capture_output=True, text=True, check=False
    ).stdout
    return next((line.split()[1] for line in told.splitlines() if line.startswith("--index-url ")), "")


def _uv_files(environ: Mapping[str, str]) -> Iterator[Path]:
    """Yield uv's own configuration files of the user and the system."""
    home = environ.get("XDG_CONFIG_HOME") or "~/.config"
    for name in (environ.get("UV_CONFIG_FILE") or f"{home}/uv/uv.toml", "/etc/uv/uv.toml"):
        if (file := expand_user(name)).is_file() and not environ.get("UV_NO_CONFIG"):
            yield file
