"""What media may be loaded from where, and how much of it: paths, hosts, bytes, pixels, seconds.

`fetch`, `download`, `image` and `video_file` check it before they act.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, replace
from pathlib import Path

from mdi.core.errors import MediaError

MEBIBYTE = 1024 * 1024


@dataclass(frozen=True)
class MediaPolicy:
    """Limits on the media of a request. The defaults suit a server on an open network.

    media_dir: files are read only below this directory, symlinks resolved; None refuses every file.
    any_file: any file this process can read; for the command line and Python, where the user owns the
        machine.
    remote: whether http and https URLs are fetched at all.
    private_hosts: also fetch from loopback, private and other addresses off the public internet.
    max_bytes, max_video_bytes: longest image file and longest video file, in bytes as sent.
    max_image_pixels: largest image (width times height) that is decoded; checked in the header. The default
        allows the 108-megapixel pictures of phones.
    max_video_pixels: largest frame of a video that is decoded. The default allows 8K.
    max_video_frames: longest video, in frames of the file, of which a few are sampled. The default is half an hour at
        30 a second.
    video_timeout_s: seconds that counting and decoding one video, or fetching all frames of one, may take.
    timeout_s: seconds that all of one download may take, name lookup and redirects included.
    """

    media_dir: Path | None = None
    any_file: bool = False
    remote: bool = True
    private_hosts: bool = False
    max_bytes: int = 32 * MEBIBYTE
    max_video_bytes: int = 256 * MEBIBYTE
    max_image_pixels: int = 120_000_000
    max_video_pixels: int = 8192 * 4320
    max_video_frames: int = 54_000
    video_timeout_s: float = 120.0
    timeout_s: float = 20.0

    def for_video(self) -> MediaPolicy:
        """The same policy where a video is fetched."""
        return replace(self, max_bytes=self.max_video_bytes)

    def allows_address(self, address: str) -> bool:
        """Whether a download may connect to this IP address (as text, an IPv6 scope allowed)."""
        return self.private_hosts or is_public(address)

    def check_size(self, size_bytes: int) -> None:
        """Raises MediaError for a file above max_bytes."""
        if size_bytes > self.max_bytes:
            raise MediaError(
                f"the file is larger than the limit of {self.max_bytes / MEBIBYTE:.3g} MiB; send a smaller one"
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
