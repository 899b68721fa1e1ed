"""Media from the web and from buckets: only from where it is allowed, and within limits of size and time.

Whoever writes a request chooses its URLs, and this machine reaches what they cannot: services of its own network, the
metadata of its cloud, whatever its account may read. So a host must be on a list. Its address is looked up once, must
be one of the public internet, and is the one that is connected to; at every redirect all of that again.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import ipaddress
import re
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, NamedTuple

from omni_jax.errors import InputError
from omni_jax.processing.files import bucket_errors, check_bucket_url, open_bucket
from omni_jax.processing.sources import BUCKETS_ARE_OFF, WEB_IS_OFF, Source, find_scheme

MAX_FETCHED_BYTES = 2 << 30  # of one file
MAX_FETCH_SECONDS = 100.0  # for one file, its redirects included
MAX_REDIRECTS = 5

_CONNECT_SECONDS = 10.0  # to each address
_PIECE = 1 << 20  # bytes that are read at a time
_OBJECT_PIECE = 64 << 20  # the same of an object in a bucket, where each is a request
# A server that was told to close the connection and does not is given so long to send more than it has promised.
_TRAILING_SECONDS = 1.0
_DEFAULT_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
# Public addresses lie in here, with the exceptions below. Others hold an IPv4 address within, or are of one site.
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
# not of the public internet, or a way to addresses that are not, whatever this version of Python says of them
_NOT_GLOBAL = tuple(
    map(
        ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
    )
)


def _resolve(host: str, port: int) -> list[str]:
    """The addresses of a host. The system's resolver has limits of time of its own."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def _connect(address: str, port: int, seconds: float) -> socket.socket:
    return socket.create_connection((address, port), timeout=seconds)


@dataclass(frozen=True)
class Network:
    """How hosts are reached; a test puts servers of its own in its place.

    Attributes:
      resolve: the addresses of a host, given its name and a port.
      connect: to an address and a port, within so many seconds.
      make_tls: what certificates are verified with.
    """

    resolve: Callable[[str, int], list[str]] = _resolve
    connect: Callable[[str, int, float], socket.socket] = _connect
    make_tls: Callable[[], ssl.SSLContext] = ssl.create_default_context


@dataclass(frozen=True)
class RemoteAccess:
    """From where media may be fetched; from nowhere unless something is named.

    Attributes:
      web: hosts: a name, ``*.example.com`` for all below a name, ``*`` for every public one.
      buckets: ``gs://bucket`` or ``gs://bucket/folder``: what lies in it may be read.
      network: how hosts are reached.

    Raises:
      InputError: for what is no host, and no place in a bucket.
    """

    web: Sequence[str] = ()
    buckets: Sequence[str] = ()
    network: Network = Network()

    def __post_init__(self) -> None:
        for name, values in (("allow_web", self.web), ("allow_buckets", self.buckets)):
            # a string is a sequence too, of letters, and its "*" would be one of them
            if isinstance(values, str) or not all(isinstance(value, str) for value in values):
                raise InputError(f"{name} must be a list of strings")
        # frozen, so that what has been checked stays so
        object.__setattr__(self, "web", tuple(_check_pattern(pattern) for pattern in self.web))
        object.__setattr__(self, "buckets", tuple(_check_prefix(prefix) for prefix in self.buckets))

    def allows_host(self, host: str) -> bool:
        """Whether a host, in the form of ``_read_host``, is on the list."""
        for pattern in self.web:
            # with the dot, or *.example.com would allow badexample.com
            if pattern in ("*", host) or (pattern.startswith("*.") and host.endswith(pattern[1:])):
                return True
        return False

    def allows_object(self, url: str) -> bool:
        """Whether an object lies in a place that is named."""
        # with the slash, or gs://bucket/media would allow gs://bucket/media2
        return any(url == prefix or url.startswith(f"{prefix}/") for prefix in self.buckets)


NO_ACCESS = RemoteAccess()


def _check_pattern(pattern: str) -> str:
    if pattern == "*":
        return pattern
    try:
        wildcard = "*." if pattern.startswith("*.") else ""
        return wildcard + _read_host(pattern.removeprefix(wildcard))
    except InputError:
        raise InputError(
            f"allow_web: {pattern!r} is no host; write example.com, *.example.com or *, without a scheme, port or path"
        ) from None


def _check_prefix(prefix: str) -> str:
    try:
        check_bucket_url(prefix)
    except InputError as e:
        raise InputError(f"allow_buckets: {prefix!r}: {e}") from None
    return prefix.rstrip("/")


def fetch_source(value: Any, access: RemoteAccess) -> Any:
    """What a URL on the web or in a bucket names, fetched; anything else as it is.

    Raises:
      InputError: if it is not allowed, cannot be fetched, is empty, or goes over a limit.
    """
    if not isinstance(value, str):
        return value
    scheme = find_scheme(value)
    if scheme == "gs":
        data = _fetch_object(value, access)
    elif scheme in _DEFAULT_PORTS:
        data = _fetch_web(value, access)
    else:
        return value
    if not data:
        raise InputError("it is empty (0 bytes)")
    return Source(data)


class _DeadlineError(TimeoutError):
    """The time for all of a file is over."""


class _Deadline:
    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds; raises _DeadlineError if none remain."""
        seconds = self._end - time.monotonic()
        if seconds <= 0:
            raise _DeadlineError
        return seconds


def _too_late() -> str:
    return f"cannot fetch it: not all of it came in time; the limit is {MAX_FETCH_SECONDS:g} s"


# --- buckets ---


def _fetch_object(url: str, access: RemoteAccess) -> bytes:
    # before the bucket is touched: a name alone must not make this machine use its account
    if not access.buckets:
        raise InputError(BUCKETS_ARE_OFF)
    check_bucket_url(url)
    if not access.allows_object(url):
        raise InputError(f"it is not within {' or '.join(access.buckets)} (allow_buckets, --allow-buckets)")
    deadline = _Deadline(MAX_FETCH_SECONDS)
    found: Future[bytes] = Future()

    def read() -> None:
        try:
            found.set_result(_read_object(url, deadline))
        except BaseException as e:
            found.set_exception(e)

    # A bucket's libraries have no deadline for the whole, so it is waited for from outside. What they are in then ends
    # by itself, with the piece that it reads; as a daemon, it does not keep the program from ending.
    threading.Thread(target=read, name="bucket", daemon=True).start()
    if not wait([found], deadline.remaining()).done:
        raise InputError(_too_late())
    try:
        return found.result()
    except _DeadlineError:
        raise InputError(_too_late()) from None
    except FileNotFoundError as e:
        raise InputError("no such file") from e
    except OSError as e:
        raise InputError(f"cannot fetch it: {e}") from e


def _read_object(url: str, deadline: _Deadline) -> bytes:
    with bucket_errors(url):
        files, path = open_bucket(url)
        info = files.info(path)
        if info["type"] != "file":
            raise InputError("it is not a file")
        size = info["size"]
        if size > MAX_FETCHED_BYTES:
            raise InputError(f"it has {size} bytes, over the limit of {MAX_FETCHED_BYTES}")
        data = bytearray()
        while len(data) < size:
            deadline.remaining()  # nobody waits for what would come after it
            end = min(len(data) + _OBJECT_PIECE, size)
            piece = files.cat_file(path, start=len(data), end=end)
            if len(piece) != end - len(data):
                came = len(data) + len(piece)
                raise InputError(f"cannot fetch it: {came} bytes came of the {size} that it has")
            data += piece
    return bytes(data)


# --- the web ---


class _Received(io.RawIOBase):
    """What a socket receives. Each piece must come before the deadline, so that no trickle of bytes outlasts it."""

    def __init__(self, connection: socket.socket, deadline: _Deadline) -> None:
        self._connection = connection
        self.deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(self.deadline.remaining())
        return self._connection.recv_into(buffer)

    def makefile(self, mode: str) -> io.BufferedReader:
        """All that ``http.client`` asks of a socket from which it reads a response."""
        return io.BufferedReader(self)


class _Target(NamedTuple):
    """Of a URL: what is connected to, and what is asked for there."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """The value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


def _fetch_web(url: str, access: RemoteAccess) -> bytes:
    # ``from None``: what libraries raise may quote the URL with its signature, and tracebacks show causes
    deadline = _Deadline(MAX_FETCH_SECONDS)
    try:
        for _ in range(MAX_REDIRECTS + 1):
            found = _get(url, access, deadline)
            if isinstance(found, bytes):
                return found
            url = urllib.parse.urljoin(url, found)
    except (InputError, MemoryError):
        raise
    except TimeoutError:
        raise InputError(_too_late()) from None
    except Exception as e:  # of sockets, of TLS, of HTTP; of names that are none
        raise InputError(f"cannot fetch it: {_describe_error(e)}") from None
    raise InputError(f"cannot fetch it: over {MAX_REDIRECTS} redirects")


def _describe_error(error: Exception) -> str:
    """What kind of error it is; only what the system and TLS say is quoted, for the rest may hold the URL."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate cannot be verified: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS fails: {getattr(error, 'reason', None) or type(error).__name__}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, http.client.IncompleteRead):
        return "the connection ended before all of it came"
    if isinstance(error, http.client.HTTPException):
        return f"the answer is not HTTP: {type(error).__name__}"
    return f"not a URL that can be fetched: {type(error).__name__}"


def _get(url: str, access: RemoteAccess, deadline: _Deadline) -> bytes | str:
    """Asks once: what is there, or the URL that it redirects to."""
    if not access.web:
        raise InputError(WEB_IS_OFF)
    target = _read_url(url)
    if not access.allows_host(target.host):
        raise InputError(f"{target.host} is not among the hosts that media may come from (allow_web, --allow-web)")
    request = (
        f"GET {target.path} HTTP/1.1\r\nHost: {target.authority}\r\nUser-Agent: omni_jax\r\nAccept: */*\r\n"
        "Accept-Encoding: identity\r\nConnection: close\r\n\r\n"
    )
    with contextlib.closing(_open_connection(target, access.network, deadline)) as connection:
        connection.settimeout(deadline.remaining())
        connection.sendall(request.encode("ascii"))
        received: Any = _Received(connection, deadline)
        response = http.client.HTTPResponse(received, method="GET")
        response.begin()
        location = response.getheader("Location")
        if response.status in _REDIRECTS and location:
            return location
        # its words are the server's own, and may be anything
        if response.status != 200:
            raise InputError(f"cannot fetch it: the server answers with the status {response.status}")
        return _read_body(response, received)


def _read_url(url: str) -> _Target:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in _DEFAULT_PORTS:
        raise InputError(f"a redirect leads to a URL of the kind {parts.scheme!r}; only http and https are followed")
    if parts.username is not None or parts.password is not None:
        raise InputError("a URL with the name or the password of a user is not fetched")
    port = _DEFAULT_PORTS[parts.scheme] if parts.port is None else parts.port
    # what is no ASCII, or would end the line of the request, is written with % and digits
    path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
    if parts.query:
        path += "?" + urllib.parse.quote(parts.query, safe="/?%:@!$&'()*+,;=~")
    return _Target(parts.scheme, _read_host(parts.hostname or ""), port, path)


def _read_host(name: str) -> str:
    """The one form of a host's name that is compared, looked up and verified.

    Raises:
      InputError: for what is none, and for an address in digits that are not those of the usual form: 127.1, 0x7f000001
        and 2130706433 are all 127.0.0.1 to a resolver.
    """
    try:
        if ":" in name:
            return str(ipaddress.IPv6Address(name))
        # 253 letters is the longest name that there is, and IDNA takes a while over long ones
        host = name[:254].encode("idna").decode("ascii").lower().removesuffix(".")
        if len(host) > 253 or not _HOST.fullmatch(host):
            raise ValueError
        is_address = _NUMBER.fullmatch(host.rpartition(".")[2]) is not None
        return str(ipaddress.IPv4Address(host)) if is_address else host
    except ValueError:
        raise InputError("cannot fetch it: its host is neither a name nor an address in the usual form") from None


def _open_connection(target: _Target, network: Network, deadline: _Deadline) -> socket.socket:
    """Connects to one of the addresses that were looked up and checked, and verifies the name of the host."""
    addresses = network.resolve(target.host, target.port)
    for address in addresses:
        # The address is not named: it is nobody's business outside.
        if not is_global(address):
            raise InputError(f"cannot fetch it: {target.host} is not a host of the public internet")
    connection = _connect_to_any(addresses, target.port, network, deadline)
    if target.scheme == "http":
        return connection
    try:
        connection.settimeout(deadline.remaining())  # of the whole handshake
        return network.make_tls().wrap_socket(connection, server_hostname=target.host)
    except BaseException:
        connection.close()
        raise


def _connect_to_any(addresses: Sequence[str], port: int, network: Network, deadline: _Deadline) -> socket.socket:
    error: OSError = OSError("it has no address")
    for address in addresses:
        try:
            return network.connect(address, port, min(_CONNECT_SECONDS, deadline.remaining()))
        # such as one of IPv6, where this machine has only IPv4
        except OSError as e:
            error = e
    raise error


def is_global(address: str) -> bool:
    """Whether an address is one host's on the public internet, and not a way to some other address."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address) and ip not in _GLOBAL_V6:
        return False
    if any(ip.version == network.version and ip in network for network in _NOT_GLOBAL):
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def _read_body(response: http.client.HTTPResponse, received: _Received) -> bytes:
    """What comes until the end, which must be as long as was promised, if anything was."""
    promised = response.length
    if promised is not None and promised > MAX_FETCHED_BYTES:
        raise InputError(f"it has {promised} bytes, over the limit of {MAX_FETCHED_BYTES}")
    # read to its end, so that one that is longer than promised shows
    response.length = None
    data = bytearray()
    while True:
        is_complete = len(data) == promised
        if is_complete:
            received.deadline = _Deadline(min(_TRAILING_SECONDS, received.deadline.remaining()))
        try:
            piece = response.read1(_PIECE)
        except OSError:
            if is_complete:  # the connection is kept open, or was not closed properly
                break
            raise
        if not piece:
            break
        data += piece
        if len(data) > MAX_FETCHED_BYTES:
            raise InputError(f"it is over the limit of {MAX_FETCHED_BYTES} bytes")
        if promised is not None and len(data) > promised:
            raise InputError(f"cannot fetch it: more came than the {promised} bytes that were promised")
    if promised is not None and len(data) < promised:
        raise InputError(f"cannot fetch it: {len(data)} bytes came of the {promised} that were promised")
    return bytes(data)
