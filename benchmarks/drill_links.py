"""Cuts the connections of a running process, as a broken network would: both ends find them closed, and both live on.

Linux lends one process a copy of another one's socket (pidfd_getfd); shutting the copy down shuts the connection.
That works for Unix sockets and TCP, needs no root, and runs no code in the other process.
It is allowed for the processes of one user, or where the kernel's Yama rule is strict, for descendants.
"""

import ctypes
import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experts.errors import ServingError

_PIDFD_GETFD = 438  # its number is the same on every architecture
_libc = ctypes.CDLL(None, use_errno=True)


class CannotCut(ServingError):
    """The system does not lend us the sockets of that process."""


def count_links(pid: int, address: str) -> int:
    """Accepted connections of a process on its `unix:` or `tcp:` address. Raises CannotCut, ProcessLookupError."""
    with _links(pid, address) as links:
        return len(links)


def cut_links(pid: int, address: str) -> int:
    """Closes them for both ends; how many there were. Raises CannotCut, ProcessLookupError."""
    with _links(pid, address) as links:
        for link in links:
            try:
                link.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the peer was faster
        return len(links)


@contextmanager
def _links(pid: int, address: str) -> Iterator[list[socket.socket]]:
    """Our copies of its sockets, closed at the end; the connections stay."""
    links: list[socket.socket] = []
    pidfd = os.pidfd_open(pid)
    try:
        for number in _sockets(pid):
            copy = _borrow(pidfd, number)
            if copy is None:
                continue
            if _is_link(copy, address):
                links.append(copy)
            else:
                copy.close()
        yield links
    finally:
        os.close(pidfd)
        for link in links:
            link.close()


def _sockets(pid: int) -> Iterator[int]:
    """Descriptors. Raises ProcessLookupError for a process that has gone."""
    try:
        entries = list(Path(f"/proc/{pid}/fd").iterdir())
    except FileNotFoundError:
        raise ProcessLookupError(f"process {pid} is gone") from None
    for entry in entries:
        try:
            if os.readlink(entry).startswith("socket:"):
                yield int(entry.name)
        except FileNotFoundError:
            continue  # closed meanwhile


def _borrow(pidfd: int, number: int) -> socket.socket | None:
    """None where the process has closed it meanwhile."""
    copy = _libc.syscall(_PIDFD_GETFD, pidfd, number, 0)
    if copy >= 0:
        return socket.socket(fileno=copy)
    error = ctypes.get_errno()
    if error in (errno.EBADF, errno.ESRCH):
        return None
    raise CannotCut(
        f"the sockets of another process cannot be reached ({os.strerror(error)}): leave out the faults that cut links"
    )


def _is_link(copy: socket.socket, address: str) -> bool:
    if copy.family not in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6) or copy.type != socket.SOCK_STREAM:
        return False
    if copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return False
    scheme, _, rest = address.partition(":")
    own = copy.getsockname()
    if scheme == "unix":
        return own == rest
    return not isinstance(own, str | bytes) and own[1] == int(rest.rpartition(":")[2])
