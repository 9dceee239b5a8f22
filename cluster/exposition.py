"""Pages of metrics as text: a process makes its own, and the exporter of a node asks for all of them and joins them."""

import selectors
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from prometheus_client import Metric, generate_latest
from prometheus_client.registry import Collector

GATHER_TIMEOUT_S = 1.0  # for all processes of a node together
MAX_PAGE_BYTES = 64 << 20
END = b"# EOF\n"  # of a process's page: one without it was cut off


class Gathered(NamedTuple):
    """What the processes of a node have said."""

    pages: list[bytes]
    silent: int  # processes that live, and did not answer in time or not to the end


def gather(folder: Path, *, timeout_s: float = GATHER_TIMEOUT_S) -> Gathered:
    """Asks all processes at once. Sockets on which nobody listens any more are removed."""
    deadline_s = time.monotonic() + timeout_s
    pages: dict[Path, bytes] = {}
    with selectors.DefaultSelector() as asked:
        num_alive = sum(_ask(path, asked) for path in folder.glob("*.sock"))
        while asked.get_map() and (left_s := deadline_s - time.monotonic()) > 0:
            for key, _ in asked.select(left_s):
                page: _PageSoFar = key.data
                if page.read():
                    asked.unregister(key.fd)
                    page.sock.close()
                    if page.whole:
                        pages[page.path] = bytes(page.text.removesuffix(END))
        for key in list(asked.get_map().values()):
            key.data.sock.close()
    return Gathered([pages[path] for path in sorted(pages)], num_alive - len(pages))


def merge(pages: Iterable[bytes]) -> bytes:
    """One page: every family once, with the samples of all, which differ in their labels; the first one's help wins."""
    heads: dict[bytes, bytes] = {}
    samples: dict[bytes, list[bytes]] = {}
    for page in filter(None, pages):
        # A line break in a label is escaped, so this begins a family and nothing else does.
        for family in page.removeprefix(b"# HELP ").split(b"\n# HELP "):
            name = family.partition(b" ")[0]
            meaning, kind, *lines = family.rstrip(b"\n").split(b"\n", 2)
            heads.setdefault(name, b"# HELP %b\n%b\n" % (meaning, kind))
            samples.setdefault(name, []).extend(line + b"\n" for line in lines)
    return b"".join(heads[name] + b"".join(samples[name]) for name in sorted(heads))


def render(collector: Collector, labels: Mapping[str, str]) -> bytes:
    """A process's page, less its END: a collector's families as text, every sample with these labels, too."""
    return generate_latest(_Labelled(collector, labels))


class _Labelled:
    def __init__(self, collector: Collector, labels: Mapping[str, str]) -> None:
        self._collector = collector
        self._labels = labels

    def collect(self) -> Iterable[Metric]:
        for family in self._collector.collect():
            for sample in family.samples:
                sample.labels.update(self._labels)
            yield family


class _PageSoFar:
    """What one process has said of its page."""

    def __init__(self, path: Path, sock: socket.socket) -> None:
        self.path, self.sock = path, sock
        self.text = bytearray()
        self.whole = False

    def read(self) -> bool:
        """Takes what is there; True once there will be no more."""
        try:
            chunk = self.sock.recv(1 << 18)
        except OSError:  # it died
            return True
        self.text += chunk
        self.whole = not chunk and self.text.endswith(END)
        return not chunk or len(self.text) > MAX_PAGE_BYTES


def _ask(path: Path, asked: selectors.BaseSelector) -> bool:
    """Connects; False, and the socket's file removed, where its process is gone."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        sock.connect(str(path))
    except (ConnectionRefusedError, FileNotFoundError):
        sock.close()
        path.unlink(missing_ok=True)
        return False
    except OSError:  # it has not accepted anybody for a while: stopped, or stuck
        sock.close()
        return True
    asked.register(sock, selectors.EVENT_READ, _PageSoFar(path, sock))
    return True
