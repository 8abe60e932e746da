"""Downloads from real servers on loopback, and every way they are refused."""

from __future__ import annotations

import base64
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpcore
import pytest
from testing.certificates import self_signed

from mdi.core.errors import MediaError
from mdi.media import MediaPolicy, download, fetch

BODY = bytes(range(256)) * 40
TRUSTING = MediaPolicy(private_hosts=True, fetch_timeout_s=20)
PUBLIC_ADDRESS = "93.184.216.34"


# Downloads


class Pictures(BaseHTTPRequestHandler):
    """A server whose every path misbehaves in its own way."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.seen.append(dict(self.headers))  # type: ignore[attr-defined]
        route = self.path.partition("?")[0].strip("/").split("/")
        try:
            getattr(self, "answer_" + route[0])(*route[1:])
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def answer_cat(self) -> None:
        self.answer(200, BODY)

    def answer_missing(self) -> None:
        self.answer(404, b"no such cat")

    def answer_nothing(self) -> None:
        self.answer(200)

    def answer_loop(self) -> None:
        self.answer(302, Location="/loop")

    def answer_hops(self, left: str) -> None:
        self.answer(307, Location=f"/hops/{int(left) - 1}" if int(left) > 1 else "../cat?x=1")

    def answer_to(self, *target: str) -> None:
        self.answer(301, Location="/".join(target).replace("~", "/"))

    def answer_gzip(self) -> None:
        self.answer(200, BODY, Content_Encoding="gzip")

    def answer_short(self) -> None:
        self.answer(200, BODY, Content_Length=str(len(BODY) + 5))
        self.close_connection = True

    def answer_announced(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(10**12))
        self.end_headers()

    def answer_chunked(self, n_chunks: str) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for _ in range(int(n_chunks)):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(BODY), BODY))
        self.wfile.write(b"0\r\n\r\n")

    def answer_endless(self) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        while True:
            self.wfile.write(BODY)

    def answer_silent(self) -> None:
        self.server.stop.wait(30)  # type: ignore[attr-defined]
        self.close_connection = True

    def answer_drip(self) -> None:
        """A header that never ends, each byte well within any timeout for one read."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not self.server.stop.wait(0.05):  # type: ignore[attr-defined]
            self.wfile.write(b"a")

    def log_message(self, *args: Any) -> None: ...


class PictureServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        self.seen: list[dict[str, str]] = []
        self.stop = threading.Event()
        super().__init__(("127.0.0.1", 0), Pictures)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *args: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[PictureServer]:
    server = PictureServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()
    thread.join()


def refusal(source: str, policy: MediaPolicy = TRUSTING) -> str:
    with pytest.raises(MediaError) as caught:
        fetch(source, policy)
    return str(caught.value)


def test_an_image_is_downloaded(server: PictureServer) -> None:
    assert fetch(server.url + "/cat", TRUSTING) == BODY
    assert fetch(server.url.upper() + "/cat?size=large#top", TRUSTING) == BODY
    assert server.seen[0]["Host"] == server.url.removeprefix("http://")


def test_a_body_without_length_is_downloaded(server: PictureServer) -> None:
    assert fetch(server.url + "/chunked/3", TRUSTING) == BODY * 3


def test_credentials_in_the_url_are_sent_as_basic_authorization(server: PictureServer) -> None:
    assert fetch(server.url.replace("//", "//user:p%40ss@") + "/cat", TRUSTING) == BODY
    assert base64.b64decode(server.seen[0]["Authorization"].removeprefix("Basic ")) == b"user:p@ss"


def test_three_redirects_are_followed_and_no_more(server: PictureServer) -> None:
    assert fetch(server.url + "/hops/3", TRUSTING) == BODY
    assert "more than 3 times" in refusal(server.url + "/hops/4")
    assert "more than 3 times" in refusal(server.url + "/loop")
    assert len(server.seen) == 4 + 4 + 4


@pytest.mark.parametrize("target", ["file:~~~etc~hostname", "ftp:~~host~x", "data:,x", "http:~~[::x"])
def test_a_redirect_to_anything_but_http_is_refused(server: PictureServer, target: str) -> None:
    assert "redirects to something" in refusal(f"{server.url}/to/{target}")


def test_a_server_s_failures_are_named(server: PictureServer) -> None:
    assert "answered 404" in refusal(server.url + "/missing")
    assert "empty" in refusal(server.url + "/nothing")
    assert "compressed" in refusal(server.url + "/gzip")
    assert "broke off" in refusal(server.url + "/short")


def test_a_message_does_not_repeat_the_query_of_a_url(server: PictureServer) -> None:
    assert "token" not in refusal(server.url.replace("//", "//token:token@") + "/missing?token=1")


@pytest.mark.parametrize("path", ["cat", "chunked/1", "endless", "announced"])
def test_a_body_above_the_byte_limit_is_refused(server: PictureServer, path: str) -> None:
    policy = replace(TRUSTING, max_bytes=len(BODY) - 1)
    assert "larger than the limit" in refusal(f"{server.url}/{path}", policy)


@pytest.mark.parametrize("path", ["silent", "drip"])
def test_a_slow_server_meets_the_time_limit(server: PictureServer, path: str) -> None:
    assert "longer than 0.3 seconds" in refusal(f"{server.url}/{path}", replace(TRUSTING, fetch_timeout_s=0.3))


def test_a_slow_name_lookup_meets_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()

    def stall(*args: Any, **kwargs: Any) -> list[Any]:
        done.wait(30)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", stall)
    assert "longer than 0.1 seconds" in refusal("http://slow.test/", replace(TRUSTING, fetch_timeout_s=0.1))
    done.set()


def test_a_closed_port_is_named(server: PictureServer) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        message = refusal(f"http://127.0.0.1:{free.getsockname()[1]}/")
    assert "no connection" in message


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///cat",
        "http://h:99999/",
        "http://h:0/",
        "http://0177.0.0.1/",
        "http://[::x/",
        "https://a\nb/",
    ],
)
def test_an_invalid_url_is_refused(url: str) -> None:
    assert "not a valid" in refusal(url)


def test_downloads_come_from_the_named_hosts_only(server: PictureServer, names: Callable[..., Names]) -> None:
    """Redirects to others are refused as well, before a connection."""
    names(here_test=[["127.0.0.1"]], there_test=[["127.0.0.1"]])
    policy = replace(TRUSTING, media_domains=("Here.test",))
    assert fetch(f"http://here.TEST:{server.server_port}/cat", policy) == BODY
    assert "nothing is downloaded from 'there.test' here" in refusal(
        f"http://there.test:{server.server_port}/cat", policy
    )
    target = f"http:~~there.test:{server.server_port}~cat"
    assert "from 'there.test' here" in refusal(f"http://here.test:{server.server_port}/to/{target}", policy)
    assert len(server.seen) == 2


def test_downloads_can_be_switched_off(server: PictureServer) -> None:
    assert "nothing is downloaded here" in refusal(server.url + "/cat", replace(TRUSTING, remote=False))
    assert not server.seen


def test_proxies_of_the_environment_are_ignored(server: PictureServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert fetch(server.url + "/cat", TRUSTING) == BODY


# Addresses


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "2130706433",
        "0x7f000001",
        "127.1",
        "0.0.0.0",
        "10.0.0.1",
        "192.168.0.1",
        "169.254.169.254",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[fe80::1]",
    ],
)
def test_a_private_host_is_refused_without_a_connection(server: PictureServer, host: str) -> None:
    message = refusal(f"http://{host}:{server.server_port}/cat", MediaPolicy())
    assert "not on the public internet" in message
    assert not server.seen


class Names:
    """Stands for the name service: each name's answers in turn, the last for ever."""

    def __init__(self, **answers: list[list[str]]) -> None:
        self.answers = {name.replace("_", "."): turns for name, turns in answers.items()}
        self.asked: list[str] = []
        self.real = socket.getaddrinfo

    def __call__(self, host: str, port: int, *args: Any, **kwargs: Any) -> list[Any]:
        if host not in self.answers:
            return self.real(host, port, *args, **kwargs)
        self.asked.append(host)
        turns = self.answers[host]
        addresses = turns.pop(0) if len(turns) > 1 else turns[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Names]:
    def install(**answers: list[list[str]]) -> Names:
        names = Names(**answers)
        monkeypatch.setattr(socket, "getaddrinfo", names)
        return names

    return install


@pytest.fixture
def connections(server: PictureServer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where connections were asked for. Those to PUBLIC_ADDRESS end at the server on loopback."""
    asked: list[str] = []
    real = httpcore.SyncBackend.connect_tcp

    def connect(self: httpcore.SyncBackend, host: str, *args: Any, **kwargs: Any) -> httpcore.NetworkStream:
        asked.append(host)
        return real(self, "127.0.0.1" if host == PUBLIC_ADDRESS else host, *args, **kwargs)

    monkeypatch.setattr(httpcore.SyncBackend, "connect_tcp", connect)
    return asked


def test_a_rebinding_name_is_looked_up_once_and_connected_to_where_it_was_checked(
    server: PictureServer, names: Callable[..., Names], connections: list[str]
) -> None:
    name_service = names(rebind_test=[[PUBLIC_ADDRESS], ["127.0.0.1"]])
    assert fetch(f"http://rebind.test:{server.server_port}/cat", MediaPolicy()) == BODY
    assert name_service.asked == ["rebind.test"]
    assert connections == [PUBLIC_ADDRESS]
    assert server.seen[0]["Host"] == f"rebind.test:{server.server_port}"


def test_one_private_address_among_public_ones_spoils_the_host(
    names: Callable[..., Names], connections: list[str]
) -> None:
    names(mixed_test=[[PUBLIC_ADDRESS, "10.0.0.1"]])
    message = refusal("http://mixed.test/", MediaPolicy())
    assert "'mixed.test' is unknown or not on the public internet" in message
    assert "10.0.0.1" not in message
    assert not connections


@pytest.mark.parametrize("target", ["http:~~127.0.0.1:{port}~cat", "http:~~inside.test:{port}~cat", "~~[::1]~"])
def test_a_redirect_from_a_public_to_a_private_host_is_refused(
    server: PictureServer, names: Callable[..., Names], connections: list[str], target: str
) -> None:
    names(outside_test=[[PUBLIC_ADDRESS]], inside_test=[["192.168.0.1"]])
    url = f"http://outside.test:{server.server_port}/to/{target.format(port=server.server_port)}"
    assert "not on the public internet" in refusal(url, MediaPolicy())
    assert connections == [PUBLIC_ADDRESS]
    assert len(server.seen) == 1


def test_an_unknown_host_is_refused_like_a_private_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: Any, **kwargs: Any) -> list[Any]:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "unknown or not on the public internet" in refusal("http://nowhere.test/", MediaPolicy())


def test_the_next_address_is_tried_when_one_does_not_answer(server: PictureServer, names: Callable[..., Names]) -> None:
    names(two_test=[["127.0.0.2", "127.0.0.1"]])  # the server listens on the second only
    assert fetch(f"http://two.test:{server.server_port}/cat", TRUSTING) == BODY


# TLS


@pytest.fixture
def tls_server(server: PictureServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PictureServer:
    """The same server behind TLS, with a certificate for pictures.test that `fetch` trusts."""
    certificate = self_signed(tmp_path, "pictures.test")
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(certificate)
    server.socket = serving.wrap_socket(server.socket, server_side=True)
    trusting = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr(download, "_ssl_context", lambda: trusting)
    return server


def test_tls_is_verified_for_the_name_and_not_for_the_address(
    tls_server: PictureServer, names: Callable[..., Names]
) -> None:
    names(pictures_test=[["127.0.0.1"]], other_test=[["127.0.0.1"]])
    port = tls_server.server_port
    assert fetch(f"https://pictures.test:{port}/cat", TRUSTING) == BODY
    assert "certificate is not valid" in refusal(f"https://other.test:{port}/cat")
    assert "certificate is not valid" in refusal(f"https://127.0.0.1:{port}/cat")


def test_a_certificate_of_an_unknown_authority_is_refused(
    tls_server: PictureServer, names: Callable[..., Names], monkeypatch: pytest.MonkeyPatch
) -> None:
    names(pictures_test=[["127.0.0.1"]])
    monkeypatch.setattr(download, "_ssl_context", ssl.create_default_context)
    assert "certificate is not valid" in refusal(f"https://pictures.test:{tls_server.server_port}/cat")
