"""An internet of one server on this machine, which stands in for all hosts that a test names."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from omni_jax.processing.fetch import Network

PUBLIC = "93.184.215.14"

Answer = Callable[[str], Iterable[bytes]]  # what is asked for to what is sent, piece by piece


@dataclass
class Internet:
    """Hosts by name, and who was asked for what.

    Attributes:
      hosts: the addresses of each name.
      looked_up: names, in the order in which they were asked for.
      connected: addresses and ports.
      requests: heads of what the server was sent.
    """

    port: int
    tls: ssl.SSLContext | None = None
    hosts: dict[str, list[str]] = field(default_factory=dict)
    looked_up: list[str] = field(default_factory=list)
    connected: list[tuple[str, int]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def resolve(self, host: str, port: int) -> list[str]:
        self.looked_up.append(host)
        if host not in self.hosts:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return self.hosts[host]

    def connect(self, address: str, port: int, seconds: float) -> socket.socket:
        self.connected.append((address, port))
        return socket.create_connection(("127.0.0.1", self.port), timeout=seconds)

    @property
    def network(self) -> Network:
        return Network(self.resolve, self.connect, lambda: self.tls or ssl.create_default_context())


@contextlib.contextmanager
def serve(answer: Answer, tls: ssl.SSLContext | None = None) -> Iterator[Internet]:
    """Runs the server; ``tls`` has its certificate."""
    listener = socket.create_server(("127.0.0.1", 0))
    internet = Internet(listener.getsockname()[1])

    def talk(connection: socket.socket) -> None:
        # a client that has seen enough hangs up
        with contextlib.suppress(OSError), connection:
            stream = tls.wrap_socket(connection, server_side=True) if tls else connection
            with stream:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += stream.recv(4096)
                internet.requests.append(head.decode())
                for piece in answer(head.decode().split(" ")[1]):
                    stream.sendall(piece)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # the listener is closed
                return
            threading.Thread(target=talk, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield internet
    finally:
        listener.close()


def ok(body: bytes, *headers: str) -> bytes:
    """An answer with a body, and no word of its length unless a header has it."""
    head = "\r\n".join(["HTTP/1.1 200 OK", *headers, "", ""])
    return head.encode() + body


def redirect(url: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Found\r\nLocation: {url}\r\nContent-Length: 0\r\n\r\n".encode()
