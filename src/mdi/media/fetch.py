"""From what a request names (path, file://, http(s)://, data:, bytes) to the bytes, within a policy.

Knows nothing about what the bytes mean.
"""

from __future__ import annotations

import base64
import binascii
import os
import queue
import re
import socket
import ssl
import stat
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import httpcore
import httpx

from mdi.core.errors import MediaError
from mdi.media.policy import MEBIBYTE, MediaPolicy

MAX_REDIRECTS = 3
REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})
HEADERS: Mapping[str, str] = {
    "User-Agent": "mdi-llm",
    "Accept": "image/*, video/*, */*;q=0.5",
    "Accept-Encoding": "identity",
}

_SCHEME = re.compile(r"(data):|([a-z][a-z0-9+.-]*)://", re.IGNORECASE)


def fetch(source: str | bytes | Path, policy: MediaPolicy) -> bytes:
    """The bytes behind `source`: a path, a file://, http(s):// or data: URL, or the bytes themselves.

    Never more than `policy.max_bytes`. Raises MediaError, naming the cause, when the source is missing,
    forbidden by the policy, too large, too slow, empty, or of a kind not known here.
    """
    data = source if isinstance(source, bytes) else _load(source, policy)
    if not data:
        raise MediaError("the file is empty (0 bytes)")
    _check_size(len(data), policy)
    return data


def _load(source: str | Path, policy: MediaPolicy) -> bytes:
    scheme = _SCHEME.match(source) if isinstance(source, str) else None
    if isinstance(source, Path) or scheme is None:
        return _read_file(str(source), policy)
    match scheme[scheme.lastindex or 0].lower():
        case "data":
            return _decode_data_url(source, policy)
        case "file":
            return _read_file(_path_of(source), policy)
        case "http" | "https":
            return _download(source, policy)
        case other:
            raise MediaError(f"nothing is loaded from {_shortened(other)}:// URLs; use http, https, data or a file")


def _check_size(size_bytes: int, policy: MediaPolicy) -> None:
    if size_bytes > policy.max_bytes:
        raise MediaError(
            f"the file is larger than the limit of {policy.max_bytes / MEBIBYTE:.3g} MiB; send a smaller one"
        )


def _shortened(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else text[:limit] + "..."


# Files


def _path_of(file_url: str) -> str:
    try:
        parts = urlsplit(file_url)
    except ValueError:
        raise MediaError(f"{_shortened(file_url)!r} is not a valid file URL") from None
    if parts.netloc.lower() not in ("", "localhost"):
        raise MediaError("a file:// URL names a file on this machine: write file:///path/to/file")
    return unquote(parts.path)


def _read_file(path: str, policy: MediaPolicy) -> bytes:
    name = repr(_shortened(path))
    try:
        return _read_regular_file(_permitted(path, policy), name, policy)
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
        raise MediaError(f"the file {_shortened(path)!r} is outside the media directory")
    return target


def _read_regular_file(target: Path, name: str, policy: MediaPolicy) -> bytes:
    # The path is resolved: a symlink here was put there since. And a pipe must not block the open.
    descriptor = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise MediaError(f"{name} is not a file")
        _check_size(status.st_size, policy)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(policy.max_bytes + 1)
    finally:
        os.close(descriptor)


# data: URLs


def _decode_data_url(url: str, policy: MediaPolicy) -> bytes:
    """RFC 2397, base64 or percent-encoded; forgives spaces and missing padding in base64, as browsers do."""
    head, comma, body = url.partition(",")
    if not comma:
        raise MediaError("a data: URL needs a comma before its data, as in data:image/png;base64,iVBOR...")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    if "%" in body:
        body = unquote(body)
    _check_size(len(body) // 4 * 3 - 2, policy)  # before the copies below are made
    body = "".join(body.split()).rstrip("=")
    try:
        return base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise MediaError("the data: URL does not hold valid base64") from None


# Downloads


def _download(source: str, policy: MediaPolicy) -> bytes:
    if not policy.remote:
        raise MediaError("nothing is downloaded here; send a data: URL")
    url = _parsed(source)
    name = repr(_shortened(f"{url.scheme}://{url.netloc.decode('ascii')}{url.path}"))
    deadline = _Deadline(time.monotonic() + policy.timeout_s)
    try:
        for _ in range(1 + MAX_REDIRECTS):
            answer = _request(url, name, policy, deadline)
            if isinstance(answer, bytes):
                return answer
            url = answer
    except httpcore.TimeoutException:
        raise MediaError(f"downloading {name} took longer than {policy.timeout_s:g} seconds") from None
    except httpcore.NetworkError:
        raise MediaError(f"no connection to the host of {name}, or its certificate is not valid") from None
    except httpcore.ProtocolError:
        raise MediaError(f"the server broke off while sending {name}") from None
    raise MediaError(f"{name} redirects more than {MAX_REDIRECTS} times")


def _parsed(source: str) -> httpx.URL:
    try:
        url = httpx.URL(source)
    except httpx.InvalidURL:
        raise MediaError(f"{_shortened(source)!r} is not a valid URL") from None
    if url.scheme not in ("http", "https") or not url.host or not 0 < _port(url) < 65536:
        raise MediaError(f"{_shortened(source)!r} is not a valid http or https URL")
    return url


def _port(url: httpx.URL) -> int:
    default = 443 if url.scheme == "https" else 80
    return default if url.port is None else url.port


def _request(url: httpx.URL, name: str, policy: MediaPolicy, deadline: _Deadline) -> bytes | httpx.URL:
    """One GET to a checked address: the body, or where it redirects to."""
    network = _PinnedNetwork(_checked_addresses(url, policy, deadline), deadline)
    target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
    headers = {**HEADERS, "Host": url.netloc.decode("ascii")}
    if url.userinfo:
        headers["Authorization"] = "Basic " + base64.b64encode(unquote_to_bytes(url.userinfo)).decode("ascii")
    with (
        httpcore.ConnectionPool(ssl_context=_ssl_context(), network_backend=network) as pool,
        pool.stream("GET", target, headers=list(headers.items())) as response,
    ):
        fields = {key.lower(): value.decode("latin-1") for key, value in response.headers}
        if response.status in REDIRECT_STATUSES and b"location" in fields:
            return _parsed_redirect(url, fields[b"location"], name)
        if not 200 <= response.status < 300:
            raise MediaError(f"the server answered {response.status} for {name}")
        if fields.get(b"content-encoding", "identity") != "identity":
            raise MediaError(f"the server sent {name} compressed, which was not asked for")
        return _read_body(response.iter_stream(), int(fields.get(b"content-length", 0)), policy)


def _parsed_redirect(url: httpx.URL, location: str, name: str) -> httpx.URL:
    try:
        return _parsed(str(url.join(location)))
    except (MediaError, httpx.InvalidURL):
        raise MediaError(f"{name} redirects to something that is not an http or https URL") from None


def _read_body(chunks: Iterable[bytes], announced_bytes: int, policy: MediaPolicy) -> bytes:
    _check_size(announced_bytes, policy)
    body = bytearray()
    for chunk in chunks:
        body += chunk
        _check_size(len(body), policy)
    return bytes(body)


def _checked_addresses(url: httpx.URL, policy: MediaPolicy, deadline: _Deadline) -> Sequence[str]:
    """The host's addresses, looked up once; one that the policy refuses spoils them all."""
    addresses = _resolve(url.raw_host.decode("ascii"), _port(url), deadline)
    if not addresses or not all(map(policy.allows_address, addresses)):
        raise MediaError(f"the host {_shortened(url.host)!r} is unknown or not on the public internet")
    return addresses


def _resolve(host: str, port: int, deadline: _Deadline) -> Sequence[str]:
    """The host's IP addresses, if any. `getaddrinfo` knows no timeout, so a thread waits for it."""
    answers: queue.SimpleQueue[list[str]] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            found = []
        answers.put([str(sockaddr[0]) for *_, sockaddr in found])

    threading.Thread(target=look_up, name="media-resolver", daemon=True).start()
    try:
        return answers.get(timeout=deadline.left_s())
    except queue.Empty:
        raise httpcore.ConnectTimeout("name lookup") from None


@lru_cache(maxsize=1)
def _ssl_context() -> ssl.SSLContext:
    return httpx.create_ssl_context(trust_env=False)


@dataclass(frozen=True)
class _Deadline:
    """When a download must be over, on the monotonic clock. Every wait asks for the seconds left."""

    at_s: float

    def left_s(self) -> float:
        left_s = self.at_s - time.monotonic()
        if left_s <= 0:
            raise httpcore.ReadTimeout("deadline")
        return left_s


class _PinnedNetwork(httpcore.NetworkBackend):
    """Connects to addresses that were checked before, whatever the URL's host resolves to by now.

    The URL keeps its host: the Host header, SNI and the certificate check are about the name the user gave.
    """

    def __init__(self, addresses: Sequence[str], deadline: _Deadline) -> None:
        self._addresses = addresses
        self._deadline = deadline
        self._backend = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,  # noqa: ARG002 - the addresses stand for it
        port: int,
        timeout: float | None = None,  # noqa: ARG002 - the deadline stands for it
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        *others, last = self._addresses
        for tried, address in enumerate(others):
            share_s = self._deadline.left_s() / (len(self._addresses) - tried)
            try:
                return self._connect(address, port, share_s, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return self._connect(last, port, self._deadline.left_s(), local_address, socket_options)

    def _connect(self, address: str, port: int, timeout_s: float, *options: Any) -> httpcore.NetworkStream:
        return _TimedStream(self._backend.connect_tcp(address, port, timeout_s, *options), self._deadline)


class _TimedStream(httpcore.NetworkStream):
    """A connection whose every wait ends at the deadline: a server that drips bytes gains nothing."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: _Deadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002
        return self._stream.read(max_bytes, self._deadline.left_s())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002
        self._stream.write(buffer, self._deadline.left_s())

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002
    ) -> httpcore.NetworkStream:
        stream = self._stream.start_tls(ssl_context, server_hostname, self._deadline.left_s())
        return _TimedStream(stream, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
