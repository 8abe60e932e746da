"""From what a request names (path, file://, http(s)://, data:, bytes) to the bytes, within a policy."""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
import string
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from mdi.core.config import MediaPolicy
from mdi.core.errors import MediaError
from mdi.core.messages import MediaSource
from mdi.media.download import download
from mdi.media.policy import check_size, shortened
from mdi.media.work import Work

BASE64_PIECE = 2**20  # characters; decoded within some milliseconds
_SCHEME = re.compile(r"(data):|([a-z][a-z0-9+.-]*)://", re.IGNORECASE)


def fetch(source: MediaSource, policy: MediaPolicy, work: Work | None = None) -> bytes:
    """The bytes behind `source`: a path, a file://, http(s):// or data: URL, or the bytes themselves.

    Never more than `policy.max_bytes`; `work` holds their memory. Raises MediaError, naming the cause, when the source
    is missing, forbidden by the policy, too large, too slow, empty, or of an unknown kind.
    """
    data = source if isinstance(source, bytes) else _load(source, policy, work or Work())
    if not data:
        raise MediaError("the file is empty (0 bytes)")
    check_size(policy, len(data))
    return data


def _load(source: str | Path, policy: MediaPolicy, work: Work) -> bytes:
    scheme = _SCHEME.match(source) if isinstance(source, str) else None
    if isinstance(source, Path) or scheme is None:
        return _read_file(str(source), policy, work)
    match scheme[scheme.lastindex or 0].lower():
        case "data":
            return _decode_data_url(source, policy, work)
        case "file":
            return _read_file(_path_of(source), policy, work)
        case "http" | "https":
            return download(source, policy, work)
        case other:
            raise MediaError(f"nothing is loaded from {shortened(other)}:// URLs; use http, https, data or a file")


# Files


def _path_of(file_url: str) -> str:
    try:
        parts = urlsplit(file_url)
    except ValueError:
        raise MediaError(f"{shortened(file_url)!r} is not a valid file URL") from None
    if parts.netloc.lower() not in ("", "localhost"):
        raise MediaError("a file:// URL names a file on this machine: write file:///path/to/file")
    return unquote(parts.path)


def _read_file(path: str, policy: MediaPolicy, work: Work) -> bytes:
    name = repr(shortened(path))
    try:
        return _read_regular_file(_permitted(path, policy), name, policy, work)
    except (FileNotFoundError, NotADirectoryError):
        raise MediaError(f"there is no file {name}") from None
    except PermissionError:
        raise MediaError(f"the file {name} may not be read by this process") from None
    except (OSError, ValueError, RuntimeError):  # name too long, NUL in the name, loop of symlinks
        raise MediaError(f"the file {name} cannot be read") from None


def _permitted(path: str, policy: MediaPolicy) -> Path:
    """The file to open, symlinks resolved; relative paths start at the media directory, if there is one."""
    if policy.any_file:
        return Path(path).resolve()
    if policy.media_dir is None:
        raise MediaError("files on this machine are not served here; send a data: URL")
    root = policy.media_dir.resolve()
    target = (root / path).resolve()
    if not target.is_relative_to(root):
        raise MediaError(f"the file {shortened(path)!r} is outside the media directory")
    return target


def _read_regular_file(target: Path, name: str, policy: MediaPolicy, work: Work) -> bytes:
    # The path is resolved: a symlink here is new, and refused. O_NONBLOCK: a pipe must not block the open.
    descriptor = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise MediaError(f"{name} is not a file")
        check_size(policy, status.st_size)
        work.reserve(status.st_size)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(policy.max_bytes + 1)
    finally:
        os.close(descriptor)


# data: URLs


def _decode_data_url(url: str, policy: MediaPolicy, work: Work) -> bytes:
    """RFC 2397, base64 or percent-encoded; accepts spaces and missing padding in base64, as browsers do."""
    head, comma, body = url.partition(",")
    if not comma:
        raise MediaError("a data: URL needs a comma before its data, as in data:image/png;base64,iVBOR...")
    check_size(policy, len(body) // 4)  # before any copy: a byte takes 4 characters at most
    work.reserve(len(body))
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    if "%" in body:
        body = unquote(body)
    check_size(policy, len(body) // 4 * 3 - 2)  # before the copies below are made
    try:
        return b"".join(_base64_pieces(body.rstrip("=" + string.whitespace)))
    except (binascii.Error, ValueError):
        raise MediaError("the data: URL does not hold valid base64") from None


def _base64_pieces(body: str) -> Iterator[bytes]:
    """Decoded piece by piece, as other threads cannot run meanwhile. Raises ValueError for what is no base64."""
    rest = ""
    for start in range(0, len(body), BASE64_PIECE):
        rest += "".join(body[start : start + BASE64_PIECE].split())
        if "=" in rest:
            raise ValueError("padding before the end")
        whole = len(rest) // 4 * 4
        yield base64.b64decode(rest[:whole], validate=True)
        rest = rest[whole:]
    yield base64.b64decode(rest + "=" * (-len(rest) % 4), validate=True)
