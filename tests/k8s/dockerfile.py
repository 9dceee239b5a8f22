"""Reads the Dockerfile, and carries out some of its stages in a folder in the place of a container engine."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One instruction: its word in capitals, and the rest with continued lines joined."""

    word: str
    rest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    name: str
    base: str  # an image, or the name of a stage
    steps: tuple[Step, ...]

    def all(self, word: str) -> list[str]:
        return [step.rest for step in self.steps if step.word == word]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dockerfile:
    arguments: Mapping[str, str]  # those before the first stage, with their defaults
    stages: Mapping[str, Stage]

    def lineage(self, name: str) -> list[Stage]:
        """The stage and those that it is built on, itself last."""
        stage = self.stages[name]
        below = self.lineage(stage.base) if stage.base in self.stages else []
        return [*below, stage]

    def steps(self, name: str) -> list[Step]:
        return [step for stage in self.lineage(name) for step in stage.steps]


def read(file: Path = ROOT / "Dockerfile") -> Dockerfile:
    """Raises ValueError for a stage without a name."""
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    found: list[tuple[str, str, list[Step]]] = []
    for step in _instructions(file.read_text(encoding="utf-8")):
        if step.word == "FROM":
            named = re.fullmatch(r"(\S+) AS (\S+)", step.rest)
            if named is None:
                raise ValueError(f"FROM {step.rest} has no name")
            found.append((named[2], named[1], []))
        elif found:
            found[-1][2].append(step)
        else:
            name, _, default = step.rest.partition("=")
            arguments[name] = default
    for name, base, steps in found:
        stages[name] = Stage(name=name, base=base, steps=tuple(steps))
    return Dockerfile(arguments=arguments, stages=stages)


def context_files(root: Path = ROOT) -> list[Path]:
    """What an image build would be given of `root`, relative to it: .dockerignore has the last word, line by line."""
    lines = (root / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    )
    files = [Path(name) for name in listed.stdout.splitlines()]
    return [file for file in files if (root / file).is_file() and not _ignored(file, patterns)]


def carry_out(
    stage: Stage, root: Path, context: Path, environment: Mapping[str, str], *, instead: Callable[[], object]
) -> None:
    """Runs a stage's COPY and RUN steps as if `root` were the root folder.

    instead: called in the place of a step that takes packages by their hashes, which needs an index.
    Raises CalledProcessError where a step fails.
    """
    at = root
    for step in stage.steps:
        if step.word == "WORKDIR":
            at = root / step.rest.lstrip("/")
            at.mkdir(parents=True, exist_ok=True)
        elif step.word == "COPY":
            _copy(shlex.split(step.rest), root, at, context)
        elif step.word == "RUN" and "--require-hashes" in step.rest:
            instead()
        elif step.word == "RUN":
            command = re.sub(r"(?<![\w.])/(?=opt/|wheel\b|tmp/)", f"{root}/", step.rest)
            subprocess.run(["bash", "-c", command], cwd=at, env={**os.environ, **environment}, check=True, timeout=300)


def _copy(words: Sequence[str], root: Path, at: Path, context: Path) -> None:
    origin = context
    if words[0].startswith("--from="):
        origin, words = root, words[1:]
    *sources, target = words
    into = root / target.lstrip("/") if target.startswith("/") else at / target
    for source in sources:
        path = origin / source.lstrip("/")
        if path.resolve() == into.resolve():
            continue
        if path.is_dir():
            shutil.copytree(path, into, dirs_exist_ok=True)
        else:
            place = into if not (target.endswith("/") or into.is_dir()) else into / path.name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)


def _ignored(file: Path, patterns: Sequence[str]) -> bool:
    ignored = False
    for pattern in patterns:
        wanted = pattern.removeprefix("!")
        names = (str(file), *(str(parent) for parent in file.parents if parent.name))
        anywhere = wanted.removeprefix("**/")
        if any(fnmatch(name, wanted) for name in names) or (
            anywhere != wanted and any(fnmatch(part, anywhere) for part in file.parts)
        ):
            ignored = not pattern.startswith("!")
    return ignored


def _instructions(text: str) -> list[Step]:
    lines = (line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    steps = (line.split(maxsplit=1) for line in joined.splitlines() if line.strip())
    return [Step(word=word.upper(), rest=rest.strip()) for word, rest in steps]
