"""Which addresses count as the public internet."""

from __future__ import annotations

import pytest

from mdi.media import MediaPolicy
from mdi.media.policy import allows_address, is_public

PUBLIC = ["8.8.8.8", "93.184.216.34", "2606:4700::1111"]
NOT_PUBLIC = [
    "127.0.0.1",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "0.0.0.0",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::ffff:127.0.0.1",
    "::ffff:8.8.8.8",
    "::7f00:1",
    "2002:7f00:1::1",
    "2001:0:7f00:1::",
    "64:ff9b::7f00:1",
    "fe80::1",
    "fe80::1%eth0",
    "fc00::1",
    "fec0::1",
    "ff02::1",
]


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_allowed(address: str) -> None:
    assert is_public(address)
    assert allows_address(MediaPolicy(), address)


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_any_other_address_is_refused_unless_private_hosts_are_allowed(address: str) -> None:
    assert not is_public(address)
    assert not allows_address(MediaPolicy(), address)
    assert allows_address(MediaPolicy(private_hosts=True), address)


def test_the_default_policy_trusts_nobody_with_files() -> None:
    assert MediaPolicy().media_dir is None
    assert not MediaPolicy().any_file
    assert not MediaPolicy().private_hosts
