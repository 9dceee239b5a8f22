"""The parts of `make bench`: one command each, whose results are kept until the code or the command changes."""

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.result_files import read_json, write_json
from benchmarks.serving_machine import ROOT
from deploy.config import state_dir

DONE_FILE = "done.json"
# Results and what is written about them change no measurement.
_NO_CODE = (":(exclude)benchmarks/results", ":(exclude,glob)**/*.md")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One process that measures, and exits with 0 or 1 once it has."""

    name: str
    module: str
    arguments: tuple[str, ...]
    checkpoint: str = ""  # of a part that compares with vLLM

    def command(self, out: Path) -> list[str]:
        return [sys.executable, "-m", self.module, *self.arguments, "--out", str(out)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is asked of all parts alike; None: each part's own default."""

    rounds: int | None = None
    streams: tuple[int, ...] | None = None
    dtype: str = "bfloat16"
    quick: bool = False


def parts_of(wish: Wish) -> list[Part]:
    """All parts, in the order in which they run."""
    if wish.quick:
        return _quick_parts(wish)
    # Each fits into 20 GiB, and has the two that everything is compared with.
    return [
        _serving("serving-300m", wish, "bench-300m", ("D=2", "D=2 x2", "D=4", "D=4 x2")),
        _serving("serving-300m-d8", wish, "bench-300m", ("D=8", "D=8 x2")),
        _serving("serving-1b-d4", wish, "bench-1b", ("D=4", "D=4 x2")),
        _serving("serving-1b-d2", wish, "bench-1b", ("D=2", "D=2 x2")),
        _serving("serving-1b-d8", wish, "bench-1b", ("D=8", "D=8 x2")),
        Part(name="micro", module="benchmarks.bench_micro", arguments=_rounds(wish)),
        _endtoend("endtoend", wish, attention=1),
        _endtoend("endtoend-x2", wish, attention=2),
        Part(name="start", module="benchmarks.bench_start", arguments=_rounds(wish)),
    ]


def chosen(parts: Sequence[Part], names: Sequence[str]) -> list[Part]:
    """Those whose name is among `names` or begins with one of them: `serving` is all of `serving-...`.

    Raises ValueError for a name that no part has.
    """
    for name in names:
        if not any(_is_called(part, name) for part in parts):
            raise ValueError(f"there is no part {name!r}; choose of {', '.join(part.name for part in parts)}")
    return [part for part in parts if any(_is_called(part, name) for name in names)]


def _is_called(part: Part, name: str) -> bool:
    return part.name == name or part.name.startswith(f"{name}-")


def _serving(name: str, wish: Wish, checkpoint: str, splits: Sequence[str]) -> Part:
    setups = ",".join(("vllm", "vllm-tp2", *splits))
    arguments = ["--checkpoint", checkpoint, "--dtype", wish.dtype, "--setups", setups]
    if checkpoint == "bench-1b" and wish.rounds is None:
        arguments += ["--rounds", "3"]  # three times as long as the smaller one
    return Part(
        name=name,
        module="benchmarks.bench_serving",
        arguments=(*arguments, *_rounds(wish), *_streams(wish)),
        checkpoint=checkpoint,
    )


def _endtoend(name: str, wish: Wish, *, attention: int) -> Part:
    arguments = ["--dtype", wish.dtype, "--groups", "4", "--attention", str(attention)]
    # One stream cannot be shared.
    streams = (
        _streams(wish) if wish.streams is None or min(wish.streams) >= attention else _streams_from(wish, attention)
    )
    return Part(name=name, module="benchmarks.bench_endtoend", arguments=(*arguments, *_rounds(wish), *streams))


def _quick_parts(wish: Wish) -> list[Part]:
    alike = ("--quick", *_rounds(wish), *_streams(wish))
    dtype = ("--dtype", wish.dtype)
    serving = Part(
        name="serving-nano", module="benchmarks.bench_serving", arguments=(*alike, *dtype), checkpoint="nano"
    )
    return [
        serving,
        Part(name="micro", module="benchmarks.bench_micro", arguments=("--quick", *_rounds(wish))),
        Part(name="endtoend", module="benchmarks.bench_endtoend", arguments=(*alike, *dtype)),
        Part(name="start", module="benchmarks.bench_start", arguments=("--rounds", str(wish.rounds or 1))),
    ]


def _rounds(wish: Wish) -> tuple[str, ...]:
    return () if wish.rounds is None else ("--rounds", str(wish.rounds))


def _streams(wish: Wish) -> tuple[str, ...]:
    return () if wish.streams is None else ("--streams", ",".join(map(str, wish.streams)))


def _streams_from(wish: Wish, lowest: int) -> tuple[str, ...]:
    enough = [streams for streams in wish.streams or () if streams >= lowest]
    return ("--streams", ",".join(map(str, enough or [lowest])))


# What is kept of a part.


def work_folder(code: str) -> Path:
    """Where the parts of one state of the code keep their results; nothing of it belongs into the repository."""
    return state_dir() / "bench" / code


def exit_code_of(part: Part, folder: Path) -> int | None:
    """How it ended, if the same command has measured before; else None."""
    done = read_json(folder / DONE_FILE)
    exit_code = done.get("exit_code")
    same = done.get("arguments") == [part.module, *part.arguments]
    return exit_code if same and isinstance(exit_code, int) else None


def mark_done(part: Part, folder: Path, *, took_s: float, exit_code: int) -> None:
    done = {"arguments": [part.module, *part.arguments], "took_s": took_s, "exit_code": exit_code}
    write_json(folder / DONE_FILE, done)


def code_id() -> str:
    """The commit, and a digest of what differs from it in files that could change a measurement."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD").decode().strip()
        changed = _git("diff", "HEAD", "--", ".", *_NO_CODE)
        added = _git("ls-files", "--others", "--exclude-standard", "-z", "--", ".", *_NO_CODE)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    new = [ROOT / name for name in added.decode().split("\0") if name]
    contents = [changed, *(str(file).encode() + file.read_bytes() for file in new if file.is_file())]
    return commit if not any(contents) else f"{commit}-{hashlib.sha256(b''.join(contents)).hexdigest()[:8]}"


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True, timeout=30).stdout
