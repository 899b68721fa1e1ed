"""What a process opens, starts and connects to while it reads a case, told apart from what it may.

Python reports its own doings to an audit hook. C libraries open files beneath Python; these show in the system calls,
which the program strace lists. Both are judged by the same ``Rules``.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_MODULE = re.compile(r".*\.(py|pyc|so(\.[\d.]+)?)")
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# what the C library, OpenMP, FFmpeg and OpenSSL look at: clocks, processors, libraries, certificates of authorities
_SYSTEM_FILES = re.compile(
    r"/dev/(null|urandom)|/etc/(localtime|ld\.so\.cache)|/usr/share/zoneinfo/.*"
    r"|/etc/(ssl|pki)/(tls/)?(certs|openssl\.cnf)(/.*)?|/usr/(lib/ssl|share/ca-certificates)/.*"
    r"|/proc/(self|\d+)/(statm|stat|status|maps|task/\d+/comm|cgroup|mountinfo)|/proc/(meminfo|stat|cpuinfo)"
    r"|/proc/sys/vm/.*|/sys/devices/system/(cpu|node)(/.*)?|/sys/fs/cgroup/.*|(/usr)?/lib(/[\w.+-]+)*\.so[\w.]*"
)
# of the events of Python's audit hook: those that change paths; of each path, where it stands among the arguments, and
# where the folder does that it is relative to
_CHANGES: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.utime": ((0, 3),),
    "os.truncate": ((0, None),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),),
    "os.setxattr": ((0, None),),
}
_PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty")
_FORBIDDEN = ("socket.bind", "socket.sendto", "ctypes.dlopen")
_LOOKUPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")


@dataclass(frozen=True)
class Rules:
    """Where files may be opened; all paths are from their root on, without links.

    Attributes:
      writable: folders in which anything may be done.
      readable: folders that may be read.
      libraries: folders of which modules may be loaded late.
    """

    writable: tuple[str, ...]
    readable: tuple[str, ...] = ()
    libraries: tuple[str, ...] = field(
        default_factory=lambda: tuple(
            os.path.realpath(path) for path in {sys.prefix, sys.base_prefix, str(Path(__file__).parents[2])}
        )
    )

    def allows(self, path: str, *, writes: bool) -> bool:
        """Whether a path, without links, may be opened or listed."""
        if any(_is_within(path, folder) for folder in self.writable):
            return True
        if writes:
            return path == "/dev/null"
        if any(_is_within(path, folder) for folder in self.readable) or _SYSTEM_FILES.fullmatch(path):
            return True
        is_module = _MODULE.fullmatch(path) is not None or os.path.isdir(path)
        return is_module and any(_is_within(path, folder) for folder in self.libraries)


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def is_public(address: str) -> bool:
    """Whether an address is of the public internet, any IPv4 address that is inside of it included."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner and not is_public(str(inner)):
            return False
    return ip.is_global and not ip.is_multicast


@dataclass
class Observed:
    """What was seen of one case.

    Attributes:
      opens: paths that are not allowed, each with what was done.
      connections: to addresses that are not public, and look-ups of names.
      programs: that were started, and other doings that have no place here.
      num_opens: of files, all of them.
      num_connections: all of them.
    """

    opens: list[str] = field(default_factory=list)
    connections: list[str] = field(default_factory=list)
    programs: list[str] = field(default_factory=list)
    num_opens: int = 0
    num_connections: int = 0


class Trace:
    """Observes this process from ``begin`` to ``end`` by an audit hook, which stays until the process ends.

    No connection is made and no name is looked up: the hook refuses them after they are written down.
    """

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._observed: Observed | None = None
        self._thread = threading.get_ident()  # in which cases run
        self._busy = threading.local()  # while the hook itself looks at paths
        sys.addaudithook(self._handle)

    def begin(self) -> None:
        self._observed = Observed()

    def end(self) -> Observed:
        observed = self._observed
        assert observed is not None
        self._observed = None
        return observed

    def connect(self, address: str, port: int) -> None:
        """Writes down a connection that a stand-in for the network was asked for."""
        if self._observed is not None:
            self._add_connection(self._observed, f"{address} port {port}", address)

    def _handle(self, event: str, arguments: tuple[Any, ...]) -> None:
        observed = self._observed
        if observed is None or getattr(self._busy, "value", False):
            return
        self._busy.value = True
        try:
            self._observe(observed, event, arguments)
        finally:
            self._busy.value = False

    def _observe(self, observed: Observed, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = bool(flags & _WRITE_FLAGS) or (isinstance(mode, str) and not set("wax+").isdisjoint(mode))
            self._check_path(observed, "opened", path, writes)
        elif event in ("os.listdir", "os.scandir"):
            self._check_path(observed, "listed", arguments[0], False)
        elif event in _CHANGES:
            for place, folder in _CHANGES[event]:
                self._check_change(observed, event, arguments[place], -1 if folder is None else arguments[folder])
        elif event == "pickle.find_class":
            # what other threads unpickle are answers of processes that decode
            if threading.get_ident() == self._thread:
                observed.programs.append(f"{event} {arguments!r}"[:300])
        elif event in _PROGRAMS or event in _FORBIDDEN:
            observed.programs.append(f"{event} {arguments!r}"[:300])
        elif event == "socket.connect":
            address = arguments[1]
            host = str(address[0]) if isinstance(address, tuple) else ""
            self._add_connection(observed, repr(address), host)
            raise PermissionError(errno.EACCES, "no connections while fuzzing")
        elif event in _LOOKUPS:
            host = str(arguments[0])
            if not _is_address(host):
                observed.connections.append(f"looked up {host[:100]!r}")
                raise PermissionError(errno.EACCES, "no names are looked up while fuzzing")

    def _check_path(self, observed: Observed, what: str, path: Any, writes: bool) -> None:
        if path is None or isinstance(path, int):  # a descriptor, which was checked when it was opened
            return
        observed.num_opens += 1
        try:
            real = os.path.realpath(os.fsdecode(path))
        except (OSError, ValueError):  # such a path opens nothing
            return
        if not self._rules.allows(real, writes=writes):
            observed.opens.append(f"{what} {real[:300]}")

    def _check_change(self, observed: Observed, event: str, path: Any, folder: int) -> None:
        """A name that is made, changed or taken away; what a link of this name leads to is not touched."""
        if isinstance(path, int):
            return
        name = os.fsdecode(path)
        if folder >= 0:  # a descriptor
            name = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
        parent, last = os.path.split(os.path.abspath(name))
        observed.num_opens += 1
        real = os.path.join(os.path.realpath(parent), last)
        if not self._rules.allows(real, writes=True):
            observed.opens.append(f"{event} {real[:300]}")

    def _add_connection(self, observed: Observed, text: str, host: str) -> None:
        observed.num_connections += 1
        if not is_public(host):
            observed.connections.append(text)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


# --- system calls ---

MARK = "/fuzz-case"
"""A path that is not there. A process that tries to open what is below it tells strace where a case begins and ends."""

STRACE = (
    "strace",
    "-f",
    "-qq",
    "-y",
    "-s",
    "400",
    "-e",
    "trace=open,openat,openat2,creat,connect,execve,execveat",
    "-o",
)

_CALL = re.compile(r"\d+ +(\w+)\((.*)\) = (-?\d+)")
# of an open: the folder that a path is relative to, as -y shows it, and the path
_PATH = re.compile(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"')
_INET = re.compile(r'inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)"')


def mark(text: str) -> None:
    """Leaves a mark among the system calls."""
    with contextlib.suppress(OSError):
        os.close(os.open(f"{MARK}/{text}", os.O_RDONLY))


def read_system_calls(lines: Iterable[str], rules: Rules) -> Iterator[tuple[int, Observed]]:
    """Of each case, by its number, what its process did between its opens of ``begin-NUMBER`` and ``end``.

    Only calls that succeed count as opened; a connection that is refused was attempted all the same.
    """
    number = None
    observed = Observed()
    for line in lines:
        call = _CALL.match(line)
        if call is None:
            continue
        name, arguments, result = call.groups()
        found = _PATH.search(arguments)
        path = "" if found is None else os.path.join(found[1] or "", _unescape(found[2]))
        if path.startswith(f"{MARK}/begin-"):
            number = int(path.rpartition("-")[2])
            observed = Observed()
        elif path == f"{MARK}/end" and number is not None:
            yield number, observed
            number = None
        elif number is not None:
            _add_system_call(observed, rules, name, arguments, path, int(result))


def _unescape(text: str) -> str:
    return text.encode().decode("unicode_escape").encode("latin-1").decode(errors="replace")


def _add_system_call(observed: Observed, rules: Rules, name: str, arguments: str, path: str, result: int) -> None:
    if name.startswith("exec"):
        # a process that decodes is started anew after one that went over a limit
        if os.path.realpath(path) != os.path.realpath(sys.executable):
            observed.programs.append(f"{name} {path}")
    elif name == "connect":
        address = _INET.search(arguments)
        observed.num_connections += 1
        host = "" if address is None else address[1] or address[2]
        if not is_public(host):
            observed.connections.append(f"{name} {arguments[:200]}")
    elif result >= 0:
        observed.num_opens += 1
        writes = name == "creat" or any(flag in arguments for flag in ("O_WRONLY", "O_RDWR", "O_CREAT"))
        real = os.path.realpath(path)
        if not rules.allows(real, writes=writes):
            observed.opens.append(f"{name} {real}")
