"""The network of a container: a loopback and an `eth0` with an address, which the container's process creates itself.

Standard library only, since it runs under the container's interpreter. It needs neither root nor the `ip` command: a
user namespace gives the rights, and it uses ioctl and netlink. Modal's proxy for `web_server` connects to eth0's
address, so a server that listens on 127.0.0.1 only fails here as it does on Modal.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from pathlib import Path

ADDRESS = "10.0.0.2"

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK = 0x8914, 0x8916, 0x891C
_IFF_UP, _IFF_RUNNING = 0x1, 0x40
_RTM_NEWLINK, _REQUEST_ACK_CREATE_EXCL = 16, 0x1 | 0x4 | 0x400 | 0x200
_IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_INFO_KIND = 3, 18, 1


def isolate() -> None:
    """Move this process into a network namespace of its own; no thread may run yet. Raises: OSError where forbidden."""
    uid, gid = os.getuid(), os.getgid()
    if not _unshare(_CLONE_NEWNET):
        if not _unshare(_CLONE_NEWUSER | _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "this process may create neither a network nor a user namespace")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        _up(control, "lo")


def add_eth0() -> bool:
    """Create an eth0 with ADDRESS; return False where the kernel has no suitable interface type."""
    kind = next((kind for kind in ("veth", "dummy", "bridge") if _add_link("eth0", kind)), None)
    if kind is None:
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        _set_address(control, _SIOCSIFADDR, ADDRESS)
        _set_address(control, _SIOCSIFNETMASK, "255.255.255.0")
        _up(control, "eth0")
    return True


def _unshare(flags: int) -> bool:
    return bool(ctypes.CDLL(None, use_errno=True).unshare(flags) == 0)


def _up(control: socket.socket, interface: str) -> None:
    request = struct.pack("16sH14x", interface.encode(), _IFF_UP | _IFF_RUNNING)
    fcntl.ioctl(control, _SIOCSIFFLAGS, request)


def _set_address(control: socket.socket, operation: int, address: str) -> None:
    request = struct.pack("16sHH4s8x", b"eth0", socket.AF_INET, 0, socket.inet_aton(address))
    fcntl.ioctl(control, operation, request)


def _add_link(name: str, kind: str) -> bool:
    info = _attribute(_IFLA_INFO_KIND, kind.encode())
    body = struct.pack("BBHiII", 0, 0, 0, 0, 0, 0)
    body += _attribute(_IFLA_IFNAME, name.encode() + b"\0") + _attribute(_IFLA_LINKINFO, info)
    header = struct.pack("IHHII", 16 + len(body), _RTM_NEWLINK, _REQUEST_ACK_CREATE_EXCL, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        netlink.bind((0, 0))
        netlink.send(header + body)
        (error,) = struct.unpack_from("i", netlink.recv(65536), 16)
    return bool(error == 0)


def _attribute(kind: int, payload: bytes) -> bytes:
    length = 4 + len(payload)
    return struct.pack("HH", length, kind) + payload + b"\0" * (-length % 4)
