"""`python -m tests.fakes.modal [WORKDIR] [--python PATH] [--secret S:NAME=VALUE …]`: a plane for a real `modal` CLI.

Prints the environment as `export NAME=value` lines, then runs until SIGINT or SIGTERM. The output of containers is in
WORKDIR/task-<n>/log.txt.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from .errors import ClientVersionUnsupported

try:
    from . import ContainerRuntime, ModalPlane, client_directory
except ClientVersionUnsupported as error:
    sys.exit(str(error))


def main() -> None:
    """Run the plane until a signal."""
    parser = argparse.ArgumentParser(prog="python -m tests.fakes.modal", description=__doc__)
    parser.add_argument("workdir", nargs="?", type=Path, help="where containers and volumes lie (default: temporary)")
    parser.add_argument("--python", default=sys.executable, help="the containers' interpreter")
    parser.add_argument("--secret", action="append", default=[], metavar="SECRET:NAME=VALUE", help="a secret's entry")
    options = parser.parse_args()
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # before any thread starts: they inherit the mask
    workdir = options.workdir or Path(tempfile.mkdtemp(prefix="modal-plane-"))
    runtime = ContainerRuntime(python=options.python, client_path=client_directory(workdir / "client"))
    with ModalPlane(workdir, container=runtime) as plane:
        for entry in options.secret:
            name, _, assignment = entry.partition(":")
            key, _, value = assignment.partition("=")
            plane.secrets.put(name, {key: value})
        for name, value in plane.env.items():
            print(f"export {name}={value}", flush=True)  # noqa: T201 - the command's output
        signal.sigwait(signals)


if __name__ == "__main__":
    main()
