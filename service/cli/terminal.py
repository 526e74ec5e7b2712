"""What people see: the progress of a local run, and tables. Progress goes to stderr, results to stdout."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, Self, TextIO

from rich.console import Console
from rich.table import Table

from service.errors import ServiceError, UnknownModelError
from service.local.serve import Ready
from service.registry.gpus import PRICES_DATE, PRICES_SOURCE
from service.registry.models import Registry, looks_like_a_source
from service.settings import Settings

_TABLE_WIDTH = 120  # a terminal that is narrower wraps whole lines, which reads better than cut columns
_PHASES = {
    "weights": "Looking for the weights",
    "spawned": "Starting the engine",
    "started": "Importing vLLM",
    "imported": "Loading the model",
    "loaded": "Generating the first tokens",
    "canary": "Opening the port",
    "draining": "Stopping: streams in flight may finish (Ctrl-C again ends them)",
}


class Terminal:
    """The screen of `vllm-service up`: a spinner on a terminal, plain lines elsewhere; the engine's output in a file.

    Args:
        log_file: Where the engine's output goes; replaced by each run.
        verbose: Show the engine's output here too.
    """

    def __init__(self, log_file: Path, verbose: bool) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._status = self._console.status("") if self._console.is_terminal and not verbose else None
        self._log_file, self._verbose = log_file, verbose
        self._log: TextIO | None = None  # opened when something is begun: a refused run leaves another's log alone
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()
        self._closed = True
        if self._log:
            self._log.close()

    def say(self, text: str) -> None:
        """Show a sentence that stays; a download's own progress bars may follow it."""
        if self._status:
            self._status.stop()
        self._console.print(text, markup=False)

    def phase(self, text: str) -> None:
        """Show what is being waited for."""
        self._opened()
        shown = _PHASES.get(text)
        if shown and self._status:
            self._status.update(f"{shown} …")
            self._status.start()
        elif shown:
            self.say(shown)

    def engine_line(self, line: str) -> None:
        """Keep a line of the engine's output, and show it when asked to."""
        if not self._closed:
            with contextlib.suppress(OSError):  # a full disk must not stop the engine's output, and with it the engine
                self._opened().write(line + "\n")
        if self._verbose:
            self._console.print(line, markup=False)

    def _opened(self) -> TextIO:
        if self._log is None:
            try:
                self._log_file.parent.mkdir(parents=True, exist_ok=True)
                self._log = self._log_file.open("w", buffering=1)
            except OSError as error:
                raise ServiceError(
                    f"The engine's output cannot be kept in {self._log_file}: {error.strerror}. "
                    "Set XDG_STATE_HOME to a directory that is yours."
                ) from error
        return self._log

    def ready(self, ready: Ready) -> None:
        """Print what to paste."""
        if self._status:
            self._status.stop()
        Console(highlight=False, soft_wrap=True).print(_greeting(ready, self._log_file), markup=False)


def _greeting(ready: Ready, log_file: Path) -> str:
    bearer = " -H 'Authorization: Bearer '\"$API_KEY\"" if ready.asks_for_key else ""
    key = 'os.environ["API_KEY"]' if ready.asks_for_key else '"none"'
    imports = "import os\n" if ready.asks_for_key else ""
    return f"""
Ready after {ready.seconds:.1f} s: {ready.spec.key} at {ready.base_url} (the engine's output: {log_file})

curl {ready.base_url}/chat/completions{bearer} -H 'Content-Type: application/json' \\
  -d '{{"model": "llm", "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'

{imports}from openai import OpenAI  # pip install openai
client = OpenAI(base_url="{ready.base_url}", api_key={key})
chat = client.chat.completions.create(model="llm", messages=[{{"role": "user", "content": "Hello!"}}])
print(chat.choices[0].message.content)

Ctrl-C stops it."""


def print_models(registry: Registry, default: str, as_json: bool) -> None:
    """Print the registry as a table, or as a JSON array with one object a model."""
    try:
        default_key = registry.resolve(default, Settings.model_fields["model"].default).spec.key
    except UnknownModelError:
        if not looks_like_a_source(default):
            raise
        default_key = ""  # a hub id that is in no registry can be served locally
    rows = [
        {
            "key": spec.key,
            "hub_id": spec.hub_id,
            "revision": spec.revision,
            "gpu": spec.gpu,
            "n_gpu": spec.n_gpu,
            "dollars_per_hour": round(spec.tier.dollars_per_hour, 2),
            "max_model_len": spec.max_model_len,
            "weights_gb": spec.weights_gb,
            "modalities": list(spec.modalities),
            "tool_call_parser": spec.tool_call_parser,
            "reasoning_parser": spec.reasoning_parser,
            "gated": spec.gated,
            "default": spec.key == default_key,
        }
        for spec in registry.specs.values()
    ]
    console = Console(highlight=False, soft_wrap=True)
    if as_json:
        console.print(json.dumps(rows, indent=2), markup=False)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("model", "GPU", "$/h", "context", "tools", "reasoning", "gated", "hub id"):
        table.add_column(header, no_wrap=True, justify="right" if header in {"$/h", "context"} else "left")
    for row in rows:
        table.add_row(*_cells(row, registry.specs[str(row["key"])].tier.label))
    Console(highlight=False, width=_TABLE_WIDTH).print(table)
    console.print(f"* what 'llm' means; prices per replica: {PRICES_SOURCE}, {PRICES_DATE}", markup=False)


def _cells(row: dict[str, Any], gpu_label: str) -> list[str]:
    return [
        f"{row['key']} *" if row["default"] else row["key"],
        gpu_label,
        f"{row['dollars_per_hour']:.2f}",
        "-" if row["max_model_len"] is None else f"{row['max_model_len']:,}",
        row["tool_call_parser"] or "-",
        row["reasoning_parser"] or "-",
        "yes" if row["gated"] else "no",
        row["hub_id"] or "built in",
    ]
