"""What a media policy allows: addresses of downloads and sizes of files. Opens nothing and resolves no names."""

from __future__ import annotations

import ipaddress
from dataclasses import replace

from mdi.core.config import MEBIBYTE, MediaPolicy
from mdi.core.errors import MediaError


def for_video(policy: MediaPolicy) -> MediaPolicy:
    """The same policy where a video is fetched."""
    return replace(policy, max_bytes=policy.max_video_bytes)


def allows_address(policy: MediaPolicy, address: str) -> bool:
    """Whether a download may connect to this IP address (as text, an IPv6 scope allowed)."""
    return policy.private_hosts or is_public(address)


def check_host(policy: MediaPolicy, host: str) -> None:
    """Raises MediaError for a host that is not one of media_domains, if these are given."""
    if policy.media_domains and host.lower().removesuffix(".") not in map(str.lower, policy.media_domains):
        raise MediaError(f"nothing is downloaded from {shortened(host)!r} here; send a data: URL")


def check_size(policy: MediaPolicy, size_bytes: int) -> None:
    """Raises MediaError for a file above max_bytes."""
    if size_bytes > policy.max_bytes:
        raise MediaError(
            f"the file is larger than the limit of {policy.max_bytes / MEBIBYTE:.3g} MiB; send a smaller one"
        )


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet.

    Stricter than `is_global` of `ipaddress`: refuses multicast and reserved ranges, and every IPv6 form that
    carries an IPv4 address inside (mapped, 6to4, Teredo, NAT64), because the inner one escapes the check.
    """
    ip = ipaddress.ip_address(address)
    if not ip.is_global or ip.is_multicast or ip.is_reserved:
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return True
    return not (ip.is_site_local or ip.ipv4_mapped or ip.sixtofour or ip.teredo)


def shortened(text: str, limit: int = 120) -> str:
    """A name as error texts show it."""
    return text if len(text) <= limit else text[:limit] + "..."
