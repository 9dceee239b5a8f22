"""The documents say what is: config keys with their defaults, links, file names, and the commands that are shown."""

import argparse
import re
import shlex
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from pydantic.fields import FieldInfo

from deploy.cli import _parser
from deploy.config import DeploymentConfig
from experts.config import Settings

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"\b(?:cluster|router|experts|deploy|training|tests|benchmarks)/[\w/-]+\.(?:py|yaml|proto)\b")
# In code only: behind a backtick, or by its path.
COMMAND = re.compile(r"[`/]expertmesh ((?!COMMAND)[a-z][^`\n]*)")

Key = tuple[str, str]  # section, key


def schema() -> dict[Key, FieldInfo]:
    sections = {name: field.annotation for name, field in DeploymentConfig.model_fields.items()}
    return {
        (name, key): field
        for name, section in sections.items()
        if isinstance(section, type) and issubclass(section, Settings)
        for key, field in section.model_fields.items()
    }


def explained() -> dict[Key, list[str]]:
    """The tables of docs/config.md: (section, key) -> [type, default, meaning]."""
    rows: dict[Key, list[str]] = {}
    section = ""
    for line in (ROOT / "docs/config.md").read_text().splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("| `") and section in DeploymentConfig.model_fields:
            key, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
            assert (section, key.strip("`")) not in rows, f"{section}.{key} is explained twice"
            rows[section, key.strip("`")] = cells
    return rows


def commands() -> dict[str, argparse.ArgumentParser]:
    actions = _parser()._actions
    return next(dict(a.choices) for a in actions if isinstance(a, argparse._SubParsersAction))


def test_every_config_key_is_explained_and_no_other() -> None:
    assert explained().keys() == schema().keys()


@pytest.mark.parametrize(("section", "key"), sorted(schema()))
def test_a_config_keys_default_and_type_are_as_explained(section: str, key: str) -> None:
    field = schema()[section, key]
    kind, default, meaning = explained()[section, key]
    assert default.strip("`") == ("none" if field.default is None else str(field.default))
    assert meaning.endswith(".")
    if get_origin(field.annotation) is Literal:
        assert kind.replace("`", "").split(", ") == list(get_args(field.annotation))
    else:
        names = {bool: "bool", int: "int", float: "float", float | None: "float", str: "string", str | None: "string"}
        names |= {int | None: "int", dict[str, str]: "mapping"}
        assert kind.split(",")[0] == names[field.annotation]  # type: ignore[index]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_file_names_lead_somewhere(document: Path) -> None:
    text = document.read_text()
    links = [link for link in LINK.findall(text) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), f"{document.name} links to {link}"
        assert not anchor or anchor in _anchors(target), f"{document.name} links to {link}"
    for name in FILE.findall(text):
        assert (ROOT / name).exists() or "__init__" in name, f"{document.name} names {name}"


@pytest.mark.parametrize("document", [ROOT / "README.md", ROOT / "ARCHITECTURE.md"], ids=lambda path: path.name)
def test_shown_commands_and_their_options_exist(document: Path) -> None:
    known = commands()
    shown = COMMAND.findall(document.read_text())
    assert shown
    for line in shown:
        name, *words = shlex.split(line.replace("[", " ").replace("]", " ").partition("#")[0])
        assert name in known, f"{document.name} shows expertmesh {line}"
        options = {word for word in words if word.startswith("--")}
        assert options <= known[name]._option_string_actions.keys(), f"{document.name} shows expertmesh {line}"


def test_the_readme_shows_every_command_with_all_its_options() -> None:
    text = (ROOT / "README.md").read_text()
    for name, parser in commands().items():
        row = next((line for line in text.splitlines() if line.startswith(f"| `expertmesh {name}")), "")
        options = {option for option in parser._option_string_actions if option.startswith("--")} - {"--help"}
        assert {option for option in options if option not in row} == set(), f"expertmesh {name}"


def test_shown_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = {
        target
        for document in DOCUMENTS
        for line in re.findall(r"(?:^|`)make ((?:[a-z]+ ?)+)", document.read_text(), re.MULTILINE)
        for target in line.split()
    }
    assert shown <= targets, shown - targets


def _anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
