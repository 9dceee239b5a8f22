"""How each part of bench_micro is called: the product's own functions on the batches of a cell."""

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch

from benchmarks.micro_batches import (
    GroupBatch,
    batches_of,
    compute_work,
    gate_work,
    group_batch,
    plan_work,
    trip_work,
)
from benchmarks.micro_cells import Cell, Work
from benchmarks.micro_plane import Plane
from benchmarks.micro_timing import Task
from experts.compute import ExpertFFN, make_expert_ffn
from experts.weights import LayerWeights
from router.gate_fast import route_fast
from router.plan import make_plan

LAYERS_BYTES = 192 << 20  # of weights to go round, so that they come from memory as in serving, and not from a cache
Say = Callable[[str], None]


def tasks_of(cells: Sequence[Cell], stack: ExitStack, say: Say) -> list[Task]:
    """One for each cell. stack: owns the processes that they need."""
    planes: dict[tuple[int, int, int, str], Plane] = {}
    experts: dict[tuple[int, int, int, str], Experts] = {}
    tasks = []
    for cell in cells:
        match cell.part:
            case "gate":
                tasks.append(gate_task(cell))
            case "plan":
                tasks.append(plan_task(cell))
            case "trip":
                if cell.setting not in planes:
                    planes[cell.setting] = start_plane(cell, stack, say)
                tasks.append(trip_task(cell, planes[cell.setting]))
            case "compute":
                if cell.setting not in experts:
                    experts[cell.setting] = Experts(cell)
                tasks.append(compute_task(cell, experts[cell.setting]))
    return tasks


def gate_task(cell: Cell) -> Task:
    batches, shape = batches_of(cell), cell.shape
    logits = [batch.logits_bits for batch in batches]
    return Task(
        cell=cell,
        work=Work.mean([gate_work(cell, batch) for batch in batches]),
        call=lambda number: route_fast(logits[number], shape),
        num_batches=len(batches),
    )


def plan_task(cell: Cell) -> Task:
    batches = batches_of(cell)

    def call(number: int) -> object:
        batch = batches[number]
        return make_plan(batch.topk_idx, batch.topk_weights, num_experts=cell.experts, num_groups=cell.groups)

    work = Work.mean([plan_work(cell, batch) for batch in batches])
    return Task(cell=cell, work=work, call=call, num_batches=len(batches))


def start_plane(cell: Cell, stack: ExitStack, say: Say) -> Plane:
    plane = stack.enter_context(Plane(cell.shape, cell.groups))
    # For those who want to look at it with a profiler.
    say(f"D={cell.groups}, hidden {cell.hidden}, {cell.experts} experts: the router is process {plane.router_pid}")
    return plane


def trip_task(cell: Cell, plane: Plane) -> Task:
    batches = batches_of(cell)
    return Task(
        cell=cell,
        work=Work.mean([trip_work(cell, batch) for batch in batches]),
        call=lambda number: plane.ask(batches[number].x, batches[number].logits),
        num_batches=len(batches),
    )


class Experts:
    """The experts of one group in as many layers as it takes."""

    def __init__(self, cell: Cell) -> None:
        shape, dtype = cell.shape, getattr(torch, cell.dtype)
        held, hidden, inner = cell.experts // cell.groups, shape.hidden_size, shape.moe_intermediate_size
        w13 = (torch.randn(held, 2 * inner, hidden) / hidden**0.5).to(dtype)
        w2 = (torch.randn(held, hidden, inner) / inner**0.5).to(dtype)
        self.num_layers = -(-LAYERS_BYTES // (w13.nbytes + w2.nbytes))
        weights = {layer: LayerWeights(w13=w13.clone(), w2=w2.clone()) for layer in range(self.num_layers)}
        self.ffn: ExpertFFN = make_expert_ffn(weights)


def compute_task(cell: Cell, experts: Experts) -> Task:
    batches = [group_batch(cell, batch, number) for number, batch in enumerate(batches_of(cell))]
    counter = itertools.count()

    def call(number: int) -> object:
        batch: GroupBatch = batches[number]
        turn, within = divmod(next(counter), len(batches))
        # Every batch comes to every layer, and no layer again before most others.
        return experts.ffn((turn + within) % experts.num_layers, batch.x, batch.pairs)

    work = Work.mean([compute_work(cell, batch) for batch in batches])
    return Task(cell=cell, work=work, call=call, num_batches=len(batches))
