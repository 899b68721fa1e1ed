"""What is fetched comes from where it is allowed, from the public internet, whole, and in time."""

from __future__ import annotations

import http.client
import pickle
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from omni_jax.errors import InputError
from omni_jax.processing import fetch
from omni_jax.processing.fetch import RemoteAccess, fetch_source, is_global
from omni_jax.processing.sources import Source
from tests.bucket import Bucket
from tests.security.internet import PUBLIC, Internet, ok, redirect, serve

SECRETS = ("s3cret", "signature", "alice")


def get(internet: Internet, url: str = "http://a.example/x", hosts: tuple[str, ...] = ("*",)) -> bytes:
    found = fetch_source(url, RemoteAccess(hosts, network=internet.network))
    assert isinstance(found, Source) and isinstance(found.contents, bytes)
    return found.contents


def refused(internet: Internet, message: str, url: str = "http://a.example/x", hosts: tuple[str, ...] = ("*",)) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        get(internet, url, hosts)
    assert not any(secret in str(caught.value) for secret in SECRETS)
    # nor in what a traceback shows besides
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.fixture
def files() -> dict[str, Any]:
    """What the server has, by path; pieces, or a function of nothing that gives them."""
    return {"/x": [ok(b"data")]}


@pytest.fixture
def internet(files: dict[str, Any]) -> Iterator[Internet]:
    def answer(path: str) -> Any:
        found = files[path.partition("?")[0]]
        return found() if callable(found) else found

    with serve(answer) as internet:
        internet.hosts = {"a.example": [PUBLIC], "b.a.example": [PUBLIC], "c.example": [PUBLIC]}
        yield internet


def test_a_file_on_the_web(internet: Internet, files: dict[str, Any]) -> None:
    assert get(internet) == b"data"
    assert internet.connected == [(PUBLIC, 80)] and "\r\nHost: a.example\r\n" in internet.requests[0]
    files["/ä b"] = files["/%C3%A4%20b"] = [ok(b"data")]
    assert get(internet, "HTTP://A.Example.:8080/ä b?q=1#there") == b"data"
    assert internet.connected[-1] == (PUBLIC, 8080)
    assert internet.requests[1].startswith("GET /%C3%A4%20b?q=1 HTTP/1.1\r\nHost: a.example:8080\r\n")
    files["/x"] = [ok(b"4\r\nda", "Transfer-Encoding: chunked"), b"ta\r\n0\r\n\r\n"]
    assert get(internet) == b"data"


def test_what_is_not_of_the_web_is_left_alone() -> None:
    for value in ("a.wav", "call-12:30.wav", "data:audio/wav;base64,AAAA", b"bytes", Path("a"), 5, None):
        assert fetch_source(value, RemoteAccess()) is value


# --- which hosts ---


@pytest.mark.parametrize(
    ("hosts", "host", "allowed"),
    [
        (("a.example",), "a.example", True),
        (("A.Example",), "a.example", True),
        (("a.example",), "b.a.example", False),
        (("a.example",), "c.example", False),
        (("*.a.example",), "b.a.example", True),
        (("*.a.example",), "a.example", False),
        (("*.a.example",), "bad.example", False),
        (("c.example", "*.a.example"), "c.example", True),
        (("*",), "c.example", True),
        (("*.example",), "a.example.evil", False),
        ((), "a.example", False),
    ],
)
def test_hosts_on_the_list(internet: Internet, hosts: tuple[str, ...], host: str, allowed: bool) -> None:
    if allowed:
        assert get(internet, f"http://{host}/x", hosts) == b"data"
        return
    message = f"{host} is not among the hosts" if hosts else "fetching from the web is off"
    refused(internet, message, f"http://{host}/x", hosts)
    assert not internet.looked_up and not internet.connected


@pytest.mark.parametrize(
    "host", ["", "http://a.example", "a.example/x", "a.example:80", "*a.example", "a.*", "**", "0x7f.1"]
)
def test_what_is_no_host(host: str) -> None:
    with pytest.raises(InputError, match="is no host"):
        RemoteAccess((host,))


def test_a_string_is_no_list_of_hosts() -> None:
    with pytest.raises(InputError, match="allow_web must be a list"):
        RemoteAccess("*")


@pytest.mark.parametrize(
    "url",
    ["ftp://a.example/x", "file:///etc/hostname", "gopher://a.example/x", "gs://b/x", "data:text/plain;base64,AAAA"],
)
def test_redirects_to_other_schemes(internet: Internet, files: dict[str, Any], url: str) -> None:
    files["/x"] = [redirect(url)]
    refused(internet, "only http and https are followed")


def test_redirects(internet: Internet, files: dict[str, Any]) -> None:
    """At each the list is looked at, and the address is looked up and checked."""
    files["/x"] = [redirect("/y")]
    files["/y"] = [redirect("//c.example/z", 308)]
    files["/z"] = [ok(b"there")]
    assert get(internet) == b"there" and internet.looked_up == ["a.example", "a.example", "c.example"]
    refused(internet, "c.example is not among the hosts", hosts=("a.example",))
    internet.hosts["c.example"] = ["10.0.0.1"]
    refused(internet, "c.example is not a host of the public internet")
    assert len(internet.connected) == 3 + 2 + 2
    files["/z"] = [redirect("http://a.example/x")]
    internet.hosts["c.example"] = [PUBLIC]
    refused(internet, "over 5 redirects")


# --- which addresses ---

NOT_GLOBAL = """127.0.0.1 127.9.9.9 0.0.0.0 0.1.2.3 10.0.0.1 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 192.0.0.8
    192.0.2.1 198.18.0.1 203.0.113.1 224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255 :: ::1 ::ffff:127.0.0.1
    ::ffff:8.8.8.8 ::ffff:a9fe:a9fe ::127.0.0.1 64:ff9b::7f00:1 64:ff9b:1::1 2002:7f00:1:: 2001::1 2001:db8::1 fe80::1
    fe80::1%eth0 fec0::1 fc00::1 fd00:ec2::254 ff02::1""".split()


@pytest.mark.parametrize("address", NOT_GLOBAL)
def test_addresses_that_are_not_of_the_public_internet(internet: Internet, address: str) -> None:
    assert not is_global(address)
    internet.hosts["a.example"] = [address]
    refused(internet, "a.example is not a host of the public internet")
    # one of several is enough: which of them is connected to is not for whoever owns the name to choose
    internet.hosts["a.example"] = [PUBLIC, address]
    refused(internet, "a.example is not a host of the public internet")
    assert not internet.connected


@pytest.mark.parametrize("address", ["8.8.8.8", PUBLIC, "2606:4700:4700::1111", "2a00:1450:4001:82a::200e"])
def test_addresses_of_the_public_internet(address: str) -> None:
    assert is_global(address)


@pytest.mark.parametrize(
    "host",
    """127.0.0.1 localhost 2130706433 0x7f000001 017700000001 0177.0.0.1 127.1 0x7f.1 127.0.0.1. [::1]
    [::ffff:127.0.0.1] [fe80::1%25lo] ①②⑦.⓪.⓪.① 0 0.0.0.0 169.254.169.254 metadata.google.internal [::]""".split(),
)
def test_addresses_in_urls_in_any_form(internet: Internet, host: str) -> None:
    """Where the system's own resolver answers, which knows some of these forms."""
    internet.hosts = {}

    def resolve(name: str, port: int) -> list[str]:
        internet.looked_up.append(name)
        return ["169.254.169.254"] if name.endswith(".internal") else fetch.Network().resolve(name, port)

    access = RemoteAccess(("*",), network=fetch.Network(resolve, internet.connect))
    with pytest.raises(
        InputError, match=r"not a host of the public internet|neither a name nor an address|cannot fetch"
    ):
        fetch_source(f"http://{host}/x", access)
    assert not internet.connected
    assert not {"2130706433", "0x7f000001", "017700000001", "0177.0.0.1", "127.1", "0x7f.1", "0"} & set(
        internet.looked_up
    )


def test_the_address_that_was_checked_is_connected_to(internet: Internet) -> None:
    """A name that has another address at the second question gets no second question."""
    answers = iter([[PUBLIC], ["127.0.0.1"]])
    access = RemoteAccess(("*",), network=fetch.Network(lambda host, port: next(answers), internet.connect))
    fetch_source("http://a.example/x", access)
    assert internet.connected == [(PUBLIC, 80)]


def test_the_next_address_where_one_cannot_be_reached(internet: Internet) -> None:
    def connect(address: str, port: int, seconds: float) -> socket.socket:
        if ":" in address:
            raise OSError(101, "Network is unreachable")
        return internet.connect(address, port, seconds)

    addresses = ["2606:4700:4700::1111", PUBLIC]
    access = RemoteAccess(("*",), network=fetch.Network(lambda host, port: addresses, connect))
    assert fetch_source("http://a.example/x", access).contents == b"data"


# --- TLS ---


# of a.example, signed by itself, with its key, valid until 2126: openssl req -x509 -newkey rsa:2048 -nodes -days 36500
# -subj /CN=a.example -addext subjectAltName=DNS:a.example
CERTIFICATE = Path(__file__).parent / "a.example.pem"


def test_certificates_are_of_the_name() -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(CERTIFICATE)
    names: list[str | None] = []
    server.sni_callback = lambda connection, name, context: names.append(name)
    with serve(lambda path: [ok(b"data", "Content-Length: 4")], server) as internet:
        internet.hosts = {"a.example": [PUBLIC], "c.example": [PUBLIC]}
        refused(internet, "its certificate cannot be verified: self-signed certificate", "https://a.example/x")
        internet.tls = ssl.create_default_context(cafile=str(CERTIFICATE))
        assert get(internet, "https://a.example/x") == b"data" and names[-1] == "a.example"
        refused(internet, "its certificate cannot be verified: Hostname mismatch", "https://c.example/x")
        assert internet.connected[-1] == (PUBLIC, 443) and "\r\nHost: a.example\r\n" in internet.requests[0]


# --- how much, how long ---


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([ok(b"dat", "Content-Length: 4")], "3 bytes came of the 4 that were promised"),
        ([ok(b"data", "Content-Length: 3")], "more came than the 3 bytes that were promised"),
        ([ok(b"data"), b"data" * 5], "it is over the limit of 20 bytes"),
        ([ok(b"", "Content-Length: 21")], "it has 21 bytes, over the limit of 20"),
        ([ok(b"14\r\n", "Transfer-Encoding: chunked"), b"data" * 5, b"\r\n4\r\ndata\r\n0\r\n\r\n"], "limit of 20"),
        ([ok(b"9\r\ndata", "Transfer-Encoding: chunked")], "the connection ended before all of it came"),
        ([ok(b"zz\r\ndata", "Transfer-Encoding: chunked")], "cannot fetch it: "),
        ([ok(b"", "Content-Length: 0")], "it is empty (0 bytes)"),
        ([b"HTTP/1.1 404 signature\r\n\r\n"], "the server answers with the status 404"),
        ([b"HTTP/1.1 206 Partial\r\n\r\n"], "the server answers with the status 206"),
        ([b"signature \x00\xff\r\n\r\n"], "the answer is not HTTP: BadStatusLine"),
        ([b""], "the answer is not HTTP: RemoteDisconnected"),
        ([b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200], "the answer is not HTTP: HTTPException"),
        ([b"HTTP/1.1 200 OK\r\n" + b"a" * 100_000], "the answer is not HTTP: LineTooLong"),
    ],
)  # fmt: skip
def test_answers_that_are_refused(
    internet: Internet, files: dict[str, Any], monkeypatch: pytest.MonkeyPatch, pieces: list[bytes], message: str
) -> None:
    monkeypatch.setattr(fetch, "MAX_FETCHED_BYTES", 20)
    files["/x"] = pieces
    refused(internet, message, "http://a.example/x?signature=s3cret")


def test_a_server_that_keeps_the_connection_open(
    internet: Internet, files: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_TRAILING_SECONDS", 0.1)

    read = threading.Event()
    waits = []

    def stay() -> Iterator[bytes]:
        yield ok(b"data", "Content-Length: 4")
        waits.append(read.wait(60))

    files["/x"] = stay
    assert get(internet) == b"data"
    assert not waits  # the server has not closed the connection yet
    read.set()


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\n", ok(b""), ok(b"", "Transfer-Encoding: chunked")])
def test_a_trickle_of_bytes(
    internet: Internet, files: dict[str, Any], monkeypatch: pytest.MonkeyPatch, head: bytes
) -> None:
    """A limit of each piece alone would never be reached."""
    monkeypatch.setattr(fetch, "MAX_FETCH_SECONDS", 0.5)

    refusal = threading.Event()

    def trickle() -> Iterator[bytes]:
        yield head
        while not refusal.wait(0.1):
            yield b"1"

    files["/x"] = trickle
    refused(internet, "not all of it came in time; the limit is 0.5 s")
    refusal.set()


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(104, "Connection reset by peer"),
        TimeoutError("timed out"),
        socket.gaierror(-2, "Name or service not known"),
        ssl.SSLError(1, "[SSL] s3cret"),
        http.client.BadStatusLine("s3cret"),
        UnicodeError("s3cret"),
        RuntimeError("s3cret"),
    ],
)
def test_whatever_a_connection_raises(internet: Internet, error: Exception) -> None:
    def connect(address: str, port: int, seconds: float) -> socket.socket:
        raise error

    broken = fetch.Network(internet.resolve, connect)
    with pytest.raises(InputError, match="cannot fetch it: ") as caught:
        fetch_source("http://a.example/x?signature=s3cret", RemoteAccess(("*",), network=broken))
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    """http://alice:s3cret@a.example/x http://alice@a.example/x http://[x/y http:x http:///x http://a.example:s3cret/x
    http://a.example:99999/x http://a..example/x http://a.example%0d%0ax/ http://a_b!/x https://""".split(),
)
def test_urls_that_are_refused(internet: Internet, url: str) -> None:
    refused(internet, "fetch", url)
    assert not internet.looked_up


def test_no_line_can_be_smuggled_into_the_request(internet: Internet, files: dict[str, Any]) -> None:
    files["/x%20HTTP/1.1Evil:1"] = [ok(b"data")]
    assert get(internet, "http://a.example/x HTTP/1.1\r\nEvil:1?q=a b") == b"data"
    assert "\r\nEvil" not in internet.requests[0]


# --- buckets ---


BUCKETS = RemoteAccess(buckets=("gs://b/media/", "gs://other"))


def test_objects_within_a_prefix(gs: Bucket) -> None:
    for url in ("gs://b/media/a.wav", "gs://b/media/deep/a.wav", "gs://other/a.wav"):
        gs.pipe(url, b"data")
        assert fetch_source(url, BUCKETS).contents == b"data"
    for url in ("gs://b/a.wav", "gs://b/media2/a.wav", "gs://other2/a.wav", "gs://b"):
        with pytest.raises(InputError, match=re.escape("it is not within gs://b/media or gs://other")):
            fetch_source(url, BUCKETS)
    with pytest.raises(InputError, match="reading media from buckets is off"):
        fetch_source("gs://b/media/a.wav", RemoteAccess(("*",)))
    with pytest.raises(InputError, match="no such file"):
        fetch_source("gs://b/media/none.wav", BUCKETS)
    with pytest.raises(InputError, match="it is not a file"):
        fetch_source("gs://b/media/deep", BUCKETS)


@pytest.mark.parametrize(
    "name",
    ["gs:{}", "gs://{}", "gs:///{}", "GS://{}", "gs://b/media/../../{}", "gs://b/media/x::file://{}",
     "gs://b/media/./a.wav", "gs://b/media/../a.wav", "gs://../{}", "gs://b/media/zip://a::{}"],
)  # fmt: skip
def test_no_way_to_files_of_this_machine(gs: Bucket, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    with pytest.raises(InputError):
        fetch_source(name.format(tmp_path / "secret"), BUCKETS)
    with pytest.raises(InputError):
        RemoteAccess(buckets=(name.format(tmp_path / "secret"),))


def test_objects_within_the_limits(gs: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    gs.pipe("gs://b/media/a.wav", b"data")
    gs.pipe("gs://b/media/empty.wav", b"")
    with pytest.raises(InputError, match="it is empty"):
        fetch_source("gs://b/media/empty.wav", BUCKETS)
    monkeypatch.setattr(fetch, "MAX_FETCHED_BYTES", 3)
    monkeypatch.setattr(Bucket, "cat_file", None)  # no byte of it is read
    with pytest.raises(InputError, match="it has 4 bytes, over the limit of 3"):
        fetch_source("gs://b/media/a.wav", BUCKETS)


def test_an_object_that_comes_in_part(gs: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    gs.pipe("gs://b/media/a.wav", b"data")
    monkeypatch.setattr(Bucket, "cat_file", lambda *_, **__: b"dat")
    with pytest.raises(InputError, match="3 bytes came of the 4 that it has"):
        fetch_source("gs://b/media/a.wav", BUCKETS)


@pytest.mark.parametrize("method", ["info", "cat_file"])
def test_a_bucket_that_stalls(gs: Bucket, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    gs.pipe("gs://b/media/a.wav", b"data")
    refusal = threading.Event()
    waits = []
    monkeypatch.setattr(Bucket, method, lambda *_, **__: waits.append(refusal.wait(60)))
    monkeypatch.setattr(fetch, "MAX_FETCH_SECONDS", 0.5)
    with pytest.raises(InputError, match=re.escape("not all of it came in time; the limit is 0.5 s")):
        fetch_source("gs://b/media/a.wav", BUCKETS)
    assert not waits  # the bucket has not answered yet
    refusal.set()


def test_a_trickle_of_pieces(gs: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of which comes in time; when it is over nothing more is asked for."""
    gs.pipe("gs://b/media/a.wav", bytes(range(100)))
    asked = []
    original = Bucket.cat_file

    def trickle(*args: Any, **kwargs: Any) -> bytes:
        asked.append(kwargs)
        time.sleep(0.1)
        return original(*args, **kwargs)

    monkeypatch.setattr(Bucket, "cat_file", trickle)
    monkeypatch.setattr(fetch, "_OBJECT_PIECE", 30)
    assert fetch_source("gs://b/media/a.wav", BUCKETS).contents == bytes(range(100))
    assert [(kwargs["start"], kwargs["end"]) for kwargs in asked] == [(0, 30), (30, 60), (60, 90), (90, 100)]
    monkeypatch.setattr(fetch, "_OBJECT_PIECE", 1)
    monkeypatch.setattr(fetch, "MAX_FETCH_SECONDS", 0.5)
    asked.clear()
    with pytest.raises(InputError, match="not all of it came in time"):
        fetch_source("gs://b/media/a.wav", BUCKETS)
    time.sleep(0.5)
    assert len(asked) < 10


def test_what_buckets_raise_of_their_own(gs: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    class HttpError(Exception):  # as gcsfs has it
        pass

    def fail(*_: Any, **__: Any) -> None:
        raise HttpError("Forbidden: https://storage.googleapis.com/b/o?X-Goog-Signature=s3cret, 403")

    monkeypatch.setattr(Bucket, "info", fail)
    message = "cannot fetch it: HttpError: Forbidden: https://storage.googleapis.com/b/o?... 403"
    with pytest.raises(InputError, match=re.escape(message)):
        fetch_source("gs://b/media/a.wav", BUCKETS)


def test_it_travels_to_other_processes() -> None:
    access = RemoteAccess(["*.A.example"], ["gs://b/"])
    assert pickle.loads(pickle.dumps(access)) == access == RemoteAccess(("*.a.example",), ("gs://b",))
