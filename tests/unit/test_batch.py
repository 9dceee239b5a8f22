"""Rows of several askers, joined and split again: each gets the bits that it would have got alone."""

import pytest
import torch
from torch import Tensor

from experts.batch import Rows, join
from experts.compute import ExpertFFN, LoopFFN, Pairs, make_expert_ffn
from experts.weights import LayerWeights

HIDDEN, INNER, EXPERTS = 64, 32, 6


def weights(dtype: torch.dtype = torch.float32) -> LayerWeights:
    generator = torch.Generator().manual_seed(1)
    w13 = torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator) / 8
    w2 = torch.randn(EXPERTS, HIDDEN, INNER, generator=generator) / 6
    return LayerWeights(w13=w13.to(dtype), w2=w2.to(dtype))


def rows_of(asker: str, layer: int, num_rows: int, dtype: torch.dtype = torch.float32) -> Rows[str]:
    generator = torch.Generator().manual_seed(ord(asker) * 100 + num_rows)
    experts = [sorted(torch.randperm(EXPERTS, generator=generator)[: 1 + r % 4].tolist()) for r in range(num_rows)]
    flat = [(row, expert) for row, chosen in enumerate(experts) for expert in chosen]
    return Rows(
        asker=asker,
        layer=layer,
        x=torch.randn(num_rows, HIDDEN, generator=generator).to(dtype),
        pairs=Pairs(
            row=torch.tensor([row for row, _ in flat], dtype=torch.int32),
            expert=torch.tensor([expert for _, expert in flat], dtype=torch.int32),
            weight=torch.rand(len(flat), generator=generator),
        ),
    )


def answers(ffn: ExpertFFN, waiting: list[Rows[str]]) -> dict[tuple[str, int], Tensor]:
    found: dict[tuple[str, int], Tensor] = {}
    for batch in join(waiting):
        y = ffn(batch.layer, batch.x, batch.pairs)
        found |= {(asker, batch.layer): y[part] for asker, part in batch.parts}
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["loop", "kernel"])
def test_joined_rows_have_the_same_bits_as_each_asker_alone(path: str, dtype: torch.dtype) -> None:
    ffn = make_expert_ffn({1: weights(dtype), 2: weights(dtype)}, path=path)  # pyright: ignore[reportArgumentType]
    waiting = [rows_of(a, layer, n, dtype) for a, layer, n in (("a", 1, 7), ("b", 2, 3), ("c", 1, 1), ("d", 1, 20))]
    together = answers(ffn, waiting)
    assert together.keys() == {("a", 1), ("b", 2), ("c", 1), ("d", 1)}
    for rows in waiting:
        alone = ffn(rows.layer, rows.x, rows.pairs)
        assert torch.equal(together[rows.asker, rows.layer], alone)


def test_the_lowest_layer_comes_first_and_askers_in_the_order_they_came() -> None:
    batches = join([rows_of("a", 5, 2), rows_of("b", 3, 1), rows_of("c", 5, 4), rows_of("d", 3, 2)])
    assert [(batch.layer, batch.parts) for batch in batches] == [
        (3, (("b", slice(0, 1)), ("d", slice(1, 3)))),
        (5, (("a", slice(0, 2)), ("c", slice(2, 6)))),
    ]


def test_row_indices_count_through_the_whole_batch_in_order() -> None:
    (batch,) = join([rows_of("a", 1, 3), rows_of("b", 1, 2)])
    assert batch.pairs.row.dtype == torch.int32
    assert (batch.pairs.row.diff() >= 0).all()
    assert batch.pairs.row.unique().tolist() == [0, 1, 2, 3, 4]


def test_rows_that_are_alone_are_not_copied() -> None:
    rows = rows_of("a", 1, 3)
    (batch,) = join([rows])
    assert batch.x is rows.x and batch.pairs is rows.pairs


def test_one_asker_may_have_several_dispatches_of_a_layer_waiting() -> None:
    ffn = LoopFFN({1: weights()})
    first, second = rows_of("a", 1, 2), rows_of("b", 1, 3)
    (batch,) = join([first, Rows(asker="a", layer=1, x=second.x, pairs=second.pairs)])
    y = ffn(1, batch.x, batch.pairs)
    assert [asker for asker, _ in batch.parts] == ["a", "a"]
    assert torch.equal(y[batch.parts[1][1]], ffn(1, second.x, second.pairs))


def test_nothing_waiting_is_no_batch() -> None:
    assert join([]) == []
