"""What the command lines of all benchmarks have in common."""

import argparse
import datetime
import shlex
import sys
from collections.abc import Sequence


def say(text: str) -> None:
    """Progress, for people."""
    print(f"{datetime.datetime.now():%H:%M:%S}  {text}", file=sys.stderr, flush=True)


def command_of(module: str, arguments: Sequence[str] | None = None) -> str:
    """How to run this again, for the results; without --out, which is a folder of one machine.

    arguments: those of this process where it is None.
    """
    given = sys.argv[1:] if arguments is None else arguments
    kept = [
        argument for before, argument in zip(["", *given], given) if "--out" not in (before, argument.partition("=")[0])
    ]
    return shlex.join(["python", "-m", f"benchmarks.{module}", *kept])


def count(text: str) -> int:
    """An argument that is at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def counts(text: str) -> tuple[int, ...]:
    """Several of them, each once."""
    return tuple(dict.fromkeys(count(part) for part in text.split(",")))
