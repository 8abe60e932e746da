"""Downloads over HTTP and HTTPS: only from addresses that the policy allows, and within its time and size."""

from __future__ import annotations

import base64
import queue
import socket
import ssl
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import unquote_to_bytes

import httpcore
import httpx

from mdi.core.config import MediaPolicy
from mdi.core.errors import MediaError
from mdi.media.policy import allows_address, check_host, check_size, shortened
from mdi.media.work import Deadline, Work

MAX_REDIRECTS = 3
POLL_S = 0.25  # how soon a download notices that its request is cancelled
REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})
HEADERS: Mapping[str, str] = {
    "User-Agent": "mdi-llm",
    "Accept": "image/*, video/*, */*;q=0.5",
    "Accept-Encoding": "identity",
}


def download(source: str, policy: MediaPolicy, work: Work) -> bytes:
    if not policy.remote:
        raise MediaError("nothing is downloaded here; send a data: URL")
    url = _parsed(source)
    name = repr(shortened(f"{url.scheme}://{url.netloc.decode('ascii')}{url.path}"))
    deadline = Deadline.after(policy.fetch_timeout_s, work)
    try:
        for _ in range(1 + MAX_REDIRECTS):
            answer = _request(url, name, policy, deadline)
            if isinstance(answer, bytes):
                return answer
            url = answer
    except httpcore.TimeoutException:
        raise MediaError(f"downloading {name} took longer than {policy.fetch_timeout_s:g} seconds") from None
    except httpcore.NetworkError:
        raise MediaError(f"no connection to the host of {name}, or its certificate is not valid") from None
    except httpcore.ProtocolError:
        raise MediaError(f"the server broke off while sending {name}") from None
    raise MediaError(f"{name} redirects more than {MAX_REDIRECTS} times")


def _parsed(source: str) -> httpx.URL:
    try:
        url = httpx.URL(source)
    except httpx.InvalidURL:
        raise MediaError(f"{shortened(source)!r} is not a valid URL") from None
    if url.scheme not in ("http", "https") or not url.host or not 0 < _port(url) < 65536:
        raise MediaError(f"{shortened(source)!r} is not a valid http or https URL")
    return url


def _port(url: httpx.URL) -> int:
    default = 443 if url.scheme == "https" else 80
    return default if url.port is None else url.port


def _request(url: httpx.URL, name: str, policy: MediaPolicy, deadline: Deadline) -> bytes | httpx.URL:
    """One GET to a checked host and address: the body, or where it redirects to."""
    check_host(policy, url.host)
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
        return _read_body(response.iter_stream(), int(fields.get(b"content-length", 0)), policy, deadline.work)


def _parsed_redirect(url: httpx.URL, location: str, name: str) -> httpx.URL:
    try:
        return _parsed(str(url.join(location)))
    except (MediaError, httpx.InvalidURL):
        raise MediaError(f"{name} redirects to something that is not an http or https URL") from None


def _read_body(chunks: Iterable[bytes], announced_bytes: int, policy: MediaPolicy, work: Work) -> bytes:
    check_size(policy, announced_bytes)
    body = bytearray()
    for chunk in chunks:
        check_size(policy, len(body) + len(chunk))
        work.reserve(len(chunk))
        body += chunk
    return bytes(body)


def _checked_addresses(url: httpx.URL, policy: MediaPolicy, deadline: Deadline) -> Sequence[str]:
    """The host's addresses, looked up once. Raises MediaError when the policy refuses one of them."""
    addresses = _resolve(url.raw_host.decode("ascii"), _port(url), deadline)
    if not addresses or not all(allows_address(policy, address) for address in addresses):
        raise MediaError(f"the host {shortened(url.host)!r} is unknown or not on the public internet")
    return addresses


def _resolve(host: str, port: int, deadline: Deadline) -> Sequence[str]:
    """The host's IP addresses, if any. `getaddrinfo` has no time limit, so a thread waits for it."""
    answers: queue.SimpleQueue[list[str]] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            found = []
        answers.put([str(sockaddr[0]) for *_, sockaddr in found])

    threading.Thread(target=look_up, name="media-resolver", daemon=True).start()
    try:
        return answers.get(timeout=_left_s(deadline))
    except queue.Empty:
        raise httpcore.ConnectTimeout("name lookup") from None


@lru_cache(maxsize=1)
def _ssl_context() -> ssl.SSLContext:
    return httpx.create_ssl_context(trust_env=False)


def _left_s(deadline: Deadline) -> float:
    """The longest that a wait may last. Raises httpcore.ReadTimeout when none is left; AbandonedError: see `check`."""
    deadline.work.check()
    left_s = deadline.left_s
    if left_s <= 0:
        raise httpcore.ReadTimeout("deadline")
    return left_s


class _PinnedNetwork(httpcore.NetworkBackend):
    """Connects to addresses that were checked before, also when the URL's host resolves to others by now.

    The URL keeps its host: the Host header, SNI and the certificate check use the name that the user gave.
    """

    def __init__(self, addresses: Sequence[str], deadline: Deadline) -> None:
        self._addresses = addresses
        self._deadline = deadline
        self._backend = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,  # noqa: ARG002 - `addresses` replaces it
        port: int,
        timeout: float | None = None,  # noqa: ARG002 - `deadline` replaces it
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        *others, last = self._addresses
        for tried, address in enumerate(others):
            share_s = _left_s(self._deadline) / (len(self._addresses) - tried)
            try:
                return self._connect(address, port, share_s, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return self._connect(last, port, _left_s(self._deadline), local_address, socket_options)

    def _connect(self, address: str, port: int, timeout_s: float, *options: Any) -> httpcore.NetworkStream:
        return _TimedStream(self._backend.connect_tcp(address, port, timeout_s, *options), self._deadline)


class _TimedStream(httpcore.NetworkStream):
    """A connection whose every wait ends at the deadline, however slowly the server sends."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: Deadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002
        while True:
            left_s = _left_s(self._deadline)
            try:
                return self._stream.read(max_bytes, min(left_s, POLL_S))
            except httpcore.ReadTimeout:
                continue

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002
        self._stream.write(buffer, _left_s(self._deadline))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002
    ) -> httpcore.NetworkStream:
        stream = self._stream.start_tls(ssl_context, server_hostname, _left_s(self._deadline))
        return _TimedStream(stream, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
