"""What bench_micro measures: cells, the work in each, and how fast this machine could do it at best. Arithmetic only.

A floor is what cannot be undercut on the machine as it was measured in the same round: the bytes that must move over
its memory bandwidth or the products over its matmul rate, whichever takes longer, and the hops between processes.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple, Self

import numpy as np

from experts.shape import MoEShape, RoutingMethod

Part = Literal["gate", "plan", "trip", "compute"]
PARTS: tuple[Part, ...] = ("trip", "compute", "gate", "plan")
TOKENS = (1, 8, 32, 128, 512, 1024)
# As in the preset bench-300m, and so are n_group, topk_group, top_k and the width of an expert below.
HIDDEN, EXPERTS, GROUPS, INNER = 1024, 64, 4, 192


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One thing that is measured, and everything that it is a function of."""

    part: Part
    tokens: int
    hidden: int = HIDDEN
    experts: int = EXPERTS  # of a layer
    groups: int = GROUPS  # D
    dtype: str = "bfloat16"

    @property
    def shape(self) -> MoEShape:
        return MoEShape(
            moe_layers=tuple(range(1, 8)),
            hidden_size=self.hidden,
            moe_intermediate_size=INNER,
            num_experts=self.experts,
            top_k=6,
            num_model_groups=8,
            topk_group=3,
            method=RoutingMethod.GROUP_LIMITED_GREEDY,
            grouped=True,
        )

    @property
    def setting(self) -> tuple[int, int, int, str]:
        """Everything but the number of tokens: (D, hidden, experts, dtype)."""
        return self.groups, self.hidden, self.experts, self.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one call must do at least, a mean over the batches that are measured."""

    num_bytes: float  # read or written once
    flops: float = 0.0
    hops: int = 0  # messages that must follow one another

    @classmethod
    def mean(cls, works: Sequence[Self]) -> Self:
        return cls(
            num_bytes=statistics.fmean(work.num_bytes for work in works),
            flops=statistics.fmean(work.flops for work in works),
            hops=works[0].hops,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What this machine did in one round, with the number of threads that the calls may use."""

    bytes_per_s: float
    flops_per_s: Mapping[str, float]  # by dtype; empty where nothing multiplies
    hop_s: float = 0.0  # an empty message over a bare Unix socket, one way, the other process woken


class Floor(NamedTuple):
    """Seconds that the parts of some work take at best."""

    memory_s: float
    matmul_s: float
    hops_s: float

    @property
    def total_s(self) -> float:
        return max(self.memory_s, self.matmul_s) + self.hops_s


class Quantiles(NamedTuple):
    """Of one figure over the rounds."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One cell over all rounds; [num_rounds] each."""

    cell: Cell
    took_s: tuple[float, ...]
    floors: tuple[Floor, ...]

    @property
    def us(self) -> Quantiles:
        return quantiles([took_s * 1e6 for took_s in self.took_s])

    @property
    def floor_us(self) -> float:
        return statistics.median(floor.total_s for floor in self.floors) * 1e6

    @property
    def share(self) -> Quantiles:
        """Of the floor that is reached: 1 is as fast as can be. Taken round by round."""
        return self._share([floor.total_s for floor in self.floors])

    @property
    def memory_share(self) -> Quantiles:
        """Of the memory bandwidth."""
        return self._share([floor.memory_s for floor in self.floors])

    @property
    def matmul_share(self) -> Quantiles:
        """Of the matmul rate in the cell's own dtype."""
        return self._share([floor.matmul_s for floor in self.floors])

    def _share(self, floors_s: Sequence[float]) -> Quantiles:
        return quantiles([floor_s / took_s for floor_s, took_s in zip(floors_s, self.took_s)])


def floor_of(work: Work, dtype: str, speeds: Speeds) -> Floor:
    """The least that `work` can take at `speeds`."""
    return Floor(
        memory_s=work.num_bytes / speeds.bytes_per_s,
        matmul_s=work.flops / speeds.flops_per_s[dtype] if work.flops else 0.0,
        hops_s=work.hops * speeds.hop_s,
    )


def quantiles(values: Sequence[float]) -> Quantiles:
    """values: at least one."""
    return Quantiles(statistics.median(values), *(float(q) for q in np.quantile(values, (0.1, 0.9))))


def growth(results: Iterable[Result], small: Cell, large: Cell) -> Quantiles | None:
    """How many times as long `large` takes as `small`, round by round; None where one was not measured."""
    by_cell = {result.cell: result for result in results}
    if small not in by_cell or large not in by_cell:
        return None
    return quantiles([b / a for a, b in zip(by_cell[small].took_s, by_cell[large].took_s)])


def as_json(results: Iterable[Result]) -> list[dict[str, object]]:
    """Each cell with its figures as plain values."""
    return [
        {
            **asdict(result.cell),
            "us": result.us._asdict(),
            "floor_us": result.floor_us,
            "share": result.share.median,
            "memory_share": result.memory_share.median,
            "matmul_share": result.matmul_share.median,
        }
        for result in results
    ]


# Which cells: one thing is varied at a time, so that its growth can be seen.


def cells_of(part: Part, *, quick: bool = False) -> list[Cell]:
    """All that a run measures of one part. quick: only what the issue's numbers are read from."""
    tokens = (1, 32, 1024) if quick else TOKENS
    return [Cell(part=part, tokens=n, **setting) for setting in _settings(part, quick) for n in tokens]  # type: ignore[arg-type]


def _settings(part: Part, quick: bool) -> list[dict[str, object]]:
    by_groups: list[dict[str, object]] = [{"groups": groups} for groups in (4, 2, 8)]
    by_hidden: list[dict[str, object]] = [{"hidden": hidden} for hidden in (512, 2048)]
    by_experts: list[dict[str, object]] = [{"experts": experts} for experts in (32, 160, 256)]
    match part:
        case "gate":
            return [{}, *([] if quick else by_experts)]
        case "plan":
            return [*by_groups, *([] if quick else by_experts)]
        case "trip":
            return [*by_groups, *([] if quick else [*by_hidden, by_experts[1]])]
        case "compute":
            once = by_groups[:1] if quick else [*by_groups, *by_hidden, by_experts[1]]
            return [{**setting, "dtype": dtype} for dtype in ("bfloat16", "float32") for setting in once]
