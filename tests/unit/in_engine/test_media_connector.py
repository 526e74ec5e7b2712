"""Which addresses media may be fetched from; tests/engine/test_media.py fetches."""

from __future__ import annotations

import pytest
from vllm_service.media_connector import is_public

PRIVATE = [
    *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1"),
    *("255.255.255.255", "198.18.0.1", "240.0.0.1", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1"),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::", "2002:a00:1::", "64:ff9b::7f00:1", "64:ff9b::a00:1"),
    *("fd00:ec2::254", "2001:db8::1"),
]
PUBLIC = ["1.1.1.1", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]


@pytest.mark.parametrize("address", PRIVATE)
def test_address_inside_a_network_is_not_public(address: str) -> None:
    """Loopback, private, link-local with clouds' metadata, shared, multicast; as IPv4 inside IPv6 too."""
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_address_on_the_internet_is_public(address: str) -> None:
    """Of both families."""
    assert is_public(address)
