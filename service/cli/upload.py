"""Shows an upload: its progress on stderr, what to write into the models file on stdout."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from service.cli.prefetch import ProgressDisplay, size
from service.cli.terminal import print_json, progress_console, results_console
from service.modal_app import upload as uploading
from service.registry.models import Registry
from service.settings import Settings
from service.weights import revisions, uploads
from service.weights.model_directory import ModelDirectory


def run(directory: ModelDirectory, name: str, settings: Settings, as_json: bool) -> None:
    """Upload, record the revision where an entry follows the upload, and print how an entry names it.

    Raises:
        ServiceError: It failed.
        KeyboardInterrupt: It was interrupted.
    """
    with ProgressDisplay(progress_console()) as display:
        done = uploading.upload(directory, name, settings.volume_prefix, display.show)
        display.clear()
    file, pinned = _record(done.hub_id, done.revision, settings.models_file)
    entry = uploads.entry(directory, name, done.revision)
    if as_json:
        facts: dict[str, Any] = {"name": name, "kind": "adapter" if directory.is_adapter else "model"}
        more = {"left_out": directory.left_out, "recorded_in": file and str(file), "entry": entry}
        print_json(facts | asdict(done) | more)
        return
    lines = [
        f"Upload '{name}' is on volume '{done.volume}': {done.files} files, {size(done.size)}",
        f"revision {done.revision}, {size(done.sent_bytes)} sent",
    ]
    lines += [f"Left out: {', '.join(directory.left_out)}"] if directory.left_out else []
    lines += [f"Recorded in {file}: the next deploy serves it."] if file else []
    lines += [f"Entry '{key}' names another revision: write this one into it." for key in pinned]
    lines += [] if file or pinned else ["", entry]
    results_console().print("\n".join(lines), markup=False)


def _record(hub_id: str, revision: str, models_file: str | None) -> tuple[Path | None, list[str]]:
    """Record the revision for entries that name none.

    Returns:
        The lock file; None: no entry follows the upload. And the keys of the entries that name another revision.
    """
    named = {
        (spec.key, own)
        for spec in Registry.load(models_file).specs.values()
        for other, own in spec.repositories
        if other == hub_id
    }
    pinned = sorted(key for key, own in named if own and own != revision)
    if all(own for _, own in named):
        return None, pinned
    file = revisions.lock_file(models_file)
    revisions.record(file, {hub_id: revision}, update=True)
    return file, pinned
