"""Vendor Swagger UI: take the few files that `/docs` needs from its package of npm, and note their hashes.

    .venv/bin/python tools/swagger_ui.py 5.35.0

The version is in `VERSION` beside them. Script and style are kept compressed, as they are sent; `SHA256SUMS` has the
hashes of the files as npm has them.
"""

from __future__ import annotations

import gzip
import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

DIRECTORY = Path(__file__).parents[1] / "service" / "api_docs"
COMPRESSED = ("swagger-ui-bundle.js", "swagger-ui.css")
PLAIN = ("LICENSE", "NOTICE", "swagger-ui-bundle.js.LICENSE.txt")


def main(version: str) -> None:
    """Replace the files by those of this version."""
    with tempfile.TemporaryDirectory() as temporary:
        package = f"swagger-ui-dist@{version}"
        subprocess.run(["npm", "pack", "--silent", package], cwd=temporary, check=True)
        (archive,) = Path(temporary).glob("*.tgz")
        with tarfile.open(archive) as packed:
            files = {name: _read(packed, name) for name in (*COMPRESSED, *PLAIN)}
    for name, content in files.items():
        if name in COMPRESSED:
            (DIRECTORY / f"{name}.gz").write_bytes(gzip.compress(content, 9, mtime=0))
        else:
            (DIRECTORY / name).write_bytes(content)
    sums = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items()]
    (DIRECTORY / "SHA256SUMS").write_text("".join(sums))
    (DIRECTORY / "VERSION").write_text(f"swagger-ui-dist {version}\n")


def _read(packed: tarfile.TarFile, name: str) -> bytes:
    member = packed.extractfile(f"package/{name}")
    if member is None:
        raise SystemExit(f"The package has no file {name}.")
    return member.read()


if __name__ == "__main__":
    main(sys.argv[1])
