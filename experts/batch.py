"""Joins rows that wait for the same layer, whoever sent them, so that each expert's weights are read once for all."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from experts.pairs import Pairs

Asker = TypeVar("Asker")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows(Generic[Asker]):
    """One dispatch as it arrived."""

    asker: Asker  # whatever is needed to answer
    layer: int
    x: Tensor  # [num_rows, hidden_size], model dtype
    pairs: Pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch(Generic[Asker]):
    """Rows of one layer to be computed together."""

    layer: int
    x: Tensor  # [sum of num_rows, hidden_size]
    pairs: Pairs  # row indices count through the whole batch
    parts: tuple[tuple[Asker, slice], ...]  # whose rows are where


def join(waiting: Sequence[Rows[Asker]]) -> list[Batch[Asker]]:
    """One batch per layer that has rows waiting; the lowest layer first, askers in the order they came."""
    by_layer: dict[int, list[Rows[Asker]]] = {}
    for rows in waiting:
        by_layer.setdefault(rows.layer, []).append(rows)
    return [_join_layer(layer, by_layer[layer]) for layer in sorted(by_layer)]


def _join_layer(layer: int, together: list[Rows[Asker]]) -> Batch[Asker]:
    if len(together) == 1:
        only = together[0]
        return Batch(layer=layer, x=only.x, pairs=only.pairs, parts=((only.asker, slice(0, only.x.shape[0])),))
    parts: list[tuple[Asker, slice]] = []
    shifted: list[Tensor] = []
    begin = 0
    for rows in together:
        parts.append((rows.asker, slice(begin, begin + len(rows.x))))
        shifted.append(rows.pairs.row + begin)
        begin += len(rows.x)
    return Batch(
        layer=layer,
        x=torch.cat([rows.x for rows in together]),
        pairs=Pairs(
            row=torch.cat(shifted),
            expert=torch.cat([rows.pairs.expert for rows in together]),
            weight=torch.cat([rows.pairs.weight for rows in together]),
        ),
        parts=tuple(parts),
    )
