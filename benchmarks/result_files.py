"""Where results go: a Markdown file of the day for people, and latest.json for programs."""

import json
from collections.abc import Mapping
from pathlib import Path

DIGITS = 5


def add_section(folder: Path, kind: str, section: str, plain: Mapping[str, object], *, date: str) -> list[Path]:
    """Adds a run to the day's file and to latest.json, in the place of an earlier one with the same title.

    kind: of benchmark, such as serving. section: Markdown that begins with its heading of level 2, the title.
    plain: what goes into latest.json under kind and title. date: YYYY-MM-DD.
    """
    folder.mkdir(parents=True, exist_ok=True)
    day, latest = folder / f"{date}-{kind}.md", folder / "latest.json"
    old = day.read_text() if day.exists() else f"# {kind.capitalize()}, {date}\n"
    day.write_text(replace_section(old, section))
    found = read_json(latest)
    # Other benchmarks have their own keys in it.
    of_kind = found.setdefault(kind, {})
    assert isinstance(of_kind, dict)
    of_kind[_title(section)] = dict(plain)
    write_json(latest, found)
    return [day, latest]


def write_json(file: Path, found: Mapping[str, object]) -> None:
    """Numbers with as many digits as mean something."""
    file.write_text(json.dumps(_rounded(found), indent=1) + "\n")


def read_json(file: Path) -> dict[str, object]:
    """The object in a file; empty where there is none."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def replace_section(text: str, section: str) -> str:
    """A Markdown text with a section of level 2 in the place of the one with the same heading, or at its end."""
    head, *sections = ("\n" + text).split("\n## ")
    new = section.removeprefix("## ").strip()
    kept = [old.strip() for old in sections if old.strip() and _title(old) != _title(new)]
    return "\n\n## ".join([head.strip(), *kept, new]) + "\n"


def sections_of(text: str) -> list[str]:
    """The sections of level 2 of a Markdown text, each with its heading, without what stands before the first."""
    _, *sections = ("\n" + text).split("\n## ")
    return [f"## {section.strip()}" for section in sections if section.strip()]


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


def _title(section: str) -> str:
    return section.strip().removeprefix("## ").splitlines()[0].strip()
