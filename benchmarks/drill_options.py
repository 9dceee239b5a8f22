"""What a drill is to do: its command line."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from benchmarks.command_line import count
from benchmarks.drill_cluster import Size
from benchmarks.drill_faults import Lengths
from benchmarks.drill_plan import KINDS, FaultKind
from benchmarks.endtoend_cluster import free_ports
from deploy.config import DEFAULT_CONFIG, Resolved, check_machine, load, resolve


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One drill."""

    seed: int
    checkpoint: str
    size: Size
    kinds: tuple[FaultKind, ...]
    times: int  # that each kind is applied
    lengths: Lengths
    pause_s: float  # at full strength, before the next fault
    whole_timeout_s: float  # from a fault until full strength
    minutes: float  # at least
    num_streams: int  # at least
    concurrency: int  # streams at a time
    num_tokens: tuple[int, int]  # of an answer: fewest, most
    timeout_s: float  # deadline of a request
    num_alone: int  # requests that vLLM answers one by one, too
    listen: str  # unix or tcp
    out: Path | None
    history: Path | None

    @property
    def is_single(self) -> bool:
        """With one copy of each group a request may be refused, but only as a client can answer to."""
        return self.size.replicas == 1


def parse(arguments: list[str] | None = None) -> Options:
    """The command line; ends the process with a sentence where it is wrong, as argparse does."""
    parser = argparse.ArgumentParser(
        prog="drill", description="Breaks a cluster while it serves, and checks every token that it gave."
    )
    parser.add_argument("--minutes", type=_positive, default=10.0, help="how long at least (10)")
    parser.add_argument("--streams", type=count, default=200, metavar="N", help="how many at least (200)")
    parser.add_argument("--concurrency", type=count, default=8, metavar="N", help="streams at a time (8)")
    parser.add_argument("--tokens", type=_range, default=(64, 320), metavar="LOW,HIGH", help="of an answer (64,320)")
    parser.add_argument("--faults", type=_kinds, default=KINDS, metavar="KIND,KIND", help=", ".join(KINDS))
    parser.add_argument("--times", type=count, default=5, metavar="N", help="how often each kind (5)")
    parser.add_argument("--seed", type=int, default=0, help="of the script and of the requests (0)")
    parser.add_argument("--checkpoint", default="embedded", metavar="DIR", help="a folder (the embedded one)")
    parser.add_argument("--groups", type=count, default=4, metavar="D", help="expert groups (4)")
    parser.add_argument("--replicas", type=count, default=2, metavar="N", help="copies of each (2)")
    parser.add_argument("--attention", type=count, default=2, metavar="N", help="attention replicas (2)")
    parser.add_argument("--listen", choices=("unix", "tcp"), default="unix", help="links of the expert groups")
    parser.add_argument("--timeout", type=_positive, default=180.0, metavar="S", help="deadline of a request (180)")
    parser.add_argument("--pause", type=_positive, default=3.0, metavar="S", help="before each fault (3)")
    parser.add_argument("--stop", type=_positive, default=4.0, metavar="S", help="experts-stop lasts (4)")
    parser.add_argument("--cut", type=_positive, default=3.0, metavar="S", help="experts-cut, router-cut last (3)")
    parser.add_argument("--slow", type=_positive, default=8.0, metavar="S", help="experts-slow lasts (8)")
    parser.add_argument("--whole", type=_positive, default=300.0, metavar="S", help="to full strength at most (300)")
    parser.add_argument("--alone", type=count, default=8, metavar="N", help="requests that vLLM answers twice (8)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go; without it they are shown only")
    parser.add_argument("--history", type=Path, metavar="DIR", help="a folder to keep history and logs in")
    given = parser.parse_args(arguments)
    return Options(
        seed=given.seed,
        checkpoint=given.checkpoint,
        size=Size(
            groups=given.groups,
            replicas=given.replicas,
            attention=given.attention,
            routers=min(given.replicas, 2),
        ),
        kinds=given.faults,
        times=given.times,
        lengths=Lengths(stop_s=given.stop, cut_s=given.cut, slow_s=given.slow, scale_timeout_s=given.whole),
        pause_s=given.pause,
        whole_timeout_s=given.whole,
        minutes=given.minutes,
        num_streams=given.streams,
        concurrency=given.concurrency,
        num_tokens=given.tokens,
        timeout_s=given.timeout,
        num_alone=given.alone,
        listen=given.listen,
        out=given.out,
        history=given.history,
    )


def cluster_of(options: Options) -> Resolved:
    """The deployment of a drill, in float32 and on free ports. Raises ConfigError where it cannot be served."""
    http_port, grpc_port = free_ports(2)
    overrides: dict[str, object] = {
        "model.checkpoint": options.checkpoint,
        "model.dtype": "float32",  # so that right and wrong are sharp
        "gateway.http_port": http_port,
        "gateway.grpc_port": grpc_port,
        "attention.replicas": options.size.attention,
        "router.replicas": options.size.routers,
        "experts.groups": options.size.groups,
        "experts.replicas": options.size.replicas,
        "experts.listen": options.listen,
    }
    resolved = resolve(load(DEFAULT_CONFIG, overrides))
    check_machine(resolved)
    return resolved


def _kinds(text: str) -> tuple[FaultKind, ...]:
    found = tuple(dict.fromkeys(text.split(",")))
    unknown = set(found) - set(KINDS)
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} is none of {', '.join(KINDS)}")
    return cast("tuple[FaultKind, ...]", found)


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(",")
    if not 1 <= int(low) <= int(high):
        raise argparse.ArgumentTypeError(f"{text}: LOW must be at least 1, and at most HIGH")
    return int(low), int(high)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value
