"""The programs of Debian's packages that these tests run. Run as a script it prints the packages that are missing here.

Standard library only: CI runs it before anything is built.
"""

from __future__ import annotations

import os
import shutil
import sys

# Program: the package that has it.
PACKAGES = {
    "cc": "gcc libc6-dev",
    "chromium-headless-shell": "chromium-headless-shell fonts-dejavu-core",
    "curl": "curl",
    "ip": "iproute2",
    "nginx": "nginx-light",
    "nsenter": "util-linux",
    "pg_lsclusters": "postgresql",  # its server is in no user's PATH
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "strace": "strace",
    "systemd-analyze": "systemd",
    "unshare": "util-linux",
}
_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))  # not in every user's PATH


class MissingProgramError(Exception):
    """A program is not installed here."""


def find(name: str) -> str:
    """Return the path of a program.

    Raises:
        MissingProgramError: It is not installed; the message says which package has it.
    """
    if path := shutil.which(name, path=_PATH):
        return path
    raise MissingProgramError(f"{name} is not installed: sudo apt-get install {PACKAGES[name]}")


def missing_packages() -> list[str]:
    """Return the packages whose programs are not here."""
    return [package for name, package in PACKAGES.items() if shutil.which(name, path=_PATH) is None]


if __name__ == "__main__":
    sys.stdout.write(" ".join(missing_packages()))
