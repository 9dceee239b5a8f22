"""What bench_endtoend is asked to measure: its command line."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.command_line import count, counts
from benchmarks.serving_options import Options as ServingOptions
from benchmarks.serving_setups import Setup, parse_setup
from deploy.checkpoint_presets import PRESETS

# What stands in for each option that was left out.
FULL: Mapping[str, object] = {"checkpoint": "bench-300m", "streams": (1, 8, 32, 64), "output": 64, "rounds": 5}
QUICK: Mapping[str, object] = {"checkpoint": "nano", "streams": (1, 8), "output": 16, "rounds": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One run."""

    serving: ServingOptions  # of the engines; the cluster has the same
    setup: Setup  # D and the number of attention engines


def parse(arguments: list[str] | None = None) -> Options:
    """The command line; ends the process with a sentence where it is wrong, as argparse does."""
    parser = argparse.ArgumentParser(prog="bench_endtoend", description="HTTP and gRPC beside the engines alone.")
    parser.add_argument("--quick", action="store_true", help="a first look in minutes, on the nano checkpoint")
    parser.add_argument("--checkpoint", metavar="PRESET|DIR", help=f"{', '.join(PRESETS)}, or a folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--groups", type=count, default=4, metavar="D", help="expert groups (4)")
    parser.add_argument("--attention", type=count, default=1, metavar="R", help="attention replicas (1)")
    parser.add_argument("--streams", type=counts, metavar="N,N", help="how many requests run at the same time")
    parser.add_argument("--prompt", type=count, default=32, metavar="N", help="tokens in each prompt (default: 32)")
    parser.add_argument("--output", type=count, metavar="N", help="tokens of each answer")
    parser.add_argument("--rounds", type=count, metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default: 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go; without it they are shown only")
    parser.add_argument("--kv-cache-mib", type=count, default=256, metavar="N", help="of each engine (256)")
    given = vars(parser.parse_args(arguments))
    missing = QUICK if given.pop("quick") else FULL
    groups, attention = given.pop("groups"), given.pop("attention")
    if min(given["streams"] or (attention,)) < attention:
        parser.error(f"--streams must be at least {attention} each, one for every attention replica")
    filled = {name: missing.get(name) if value is None else value for name, value in given.items()}
    streams = filled["streams"]
    assert isinstance(streams, tuple)
    filled["streams"] = tuple(number for number in streams if number >= attention)
    setup = parse_setup(f"D={groups} x{attention}")
    serving = ServingOptions(
        **filled,  # type: ignore[arg-type]
        setups=(setup,),
        baseline_threads=2,
        attention_threads=None,
        expert_threads=None,
    )
    return Options(serving=serving, setup=setup)
