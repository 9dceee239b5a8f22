"""What expert replicas and routers count: accumulators against plain twins, and the families that come of them."""

import bisect
import math
import threading
from collections import Counter, deque
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import values
from numpy.typing import NDArray

from experts.counting import FOLD_NOTES, FOLD_PAIRS, Counting, Histogram, taken
from experts.metrics import BatchNote, ExpertMetrics
from experts.shape import MoEShape, RoutingMethod
from experts.wire import DType
from router.balance import balance_factors, balancedness, expert_load, group_rows
from router.gate import route
from router.routing_counts import (
    MARK_EVERY_S,
    SAMPLE_EVERY,
    SAMPLE_TOKENS,
    WINDOW_S,
    RoutingCounts,
    affinities,
    balance_factors_of,
    balancedness_of,
)

SHAPE = MoEShape(
    moe_layers=(1, 3, 4),
    hidden_size=8,
    moe_intermediate_size=8,
    num_experts=32,
    top_k=6,
    num_model_groups=8,
    topk_group=3,
    method=RoutingMethod.GROUP_LIMITED_GREEDY,
    grouped=True,
)
Logits = NDArray[np.float32]


def logits_of(num_tokens: int, seed: int) -> Logits:
    return np.random.default_rng(seed).standard_normal((num_tokens, SHAPE.num_experts), dtype=np.float32)


def chosen_of(logits: Logits) -> NDArray[np.int32]:
    return route(torch.from_numpy(logits), SHAPE).topk_idx.numpy()


def decide(counts: RoutingCounts, layer: int, logits: Logits, chosen: NDArray[np.int32]) -> None:
    """One question, for which the gate chooses `chosen`."""
    decided = chosen, np.ones(chosen.shape, np.float32)
    counts.counted(lambda *_: decided)(layer, logits, DType.FLOAT32, 1.0)


class ServerStub:
    def __init__(self) -> None:
        self.counts, self.refused = Counter({"nacks": 2}), Counter({"stalled": 1})
        self.batch_notes: deque[BatchNote] = deque()

    def note(self, layer: int, expert: NDArray[np.int32], *, num_rows: int = 5, wait_s: float = 0.0) -> None:
        self.batch_notes.append(BatchNote(layer, num_rows, torch.from_numpy(expert), wait_s, 0.5))


@pytest.fixture
def server() -> ServerStub:
    return ServerStub()


@pytest.fixture
def replica(server: ServerStub) -> ExpertMetrics:
    return ExpertMetrics(server, group=1, held=range(8, 16), layers={3, 1})


def test_a_histogram_counts_a_value_under_the_first_bound_that_is_not_below_it() -> None:
    bounds, rng = (0.1, 0.5, 2.0), np.random.default_rng(0)
    observed = [*rng.exponential(1.0, 200).tolist(), 0.1, 0.5, 2.0, 0.0]
    histogram = Histogram(bounds)
    for value in observed:
        histogram.observe(value)
    up_to = {bound: sum(value <= bound for value in observed) for bound in bounds}
    assert histogram.buckets == [*((str(bound), n) for bound, n in up_to.items()), ("+Inf", len(observed))]
    assert histogram.total == pytest.approx(sum(observed))
    at_once = Histogram(bounds)
    at_once.observe_all([])
    at_once.observe_all(observed[:100])
    at_once.observe_all(observed[100:])
    assert at_once.buckets == histogram.buckets
    assert at_once.total == pytest.approx(histogram.total)
    assert bisect.bisect(bounds, 0.1) == 1, "so bisect_right would be wrong"


@pytest.mark.parametrize("num_batches", [1, 63, 200])
def test_an_expert_replica_counts_each_experts_tokens_and_each_layers_rows(
    server: ServerStub, replica: ExpertMetrics, num_batches: int
) -> None:
    rng = np.random.default_rng(num_batches)
    tokens: Counter[tuple[int, int]] = Counter()
    rows: Counter[int] = Counter()
    for _ in range(num_batches):
        layer, num_rows = int(rng.choice([1, 3])), int(rng.integers(1, 9))
        expert = rng.integers(0, 8, 2 * num_rows).astype(np.int32)
        server.note(layer, expert, num_rows=num_rows)
        rows[layer] += num_rows
        tokens.update((layer, 8 + int(e)) for e in expert)
    replica.fold(1.0)
    counted = values(replica.collect(), "expertmesh_expert_tokens_total")
    assert counted == {(str(e), "1", str(layer)): tokens[layer, e] for layer in (1, 3) for e in range(8, 16)}
    counted = values(replica.collect(), "expertmesh_expert_rows_total")
    assert counted == {("1", str(layer)): rows[layer] for layer in (1, 3)}


def test_notes_are_taken_in_order_some_at_a_time_and_those_that_come_meanwhile_the_next_time() -> None:
    notes = deque(range(2 * FOLD_NOTES + 1))
    given: list[list[int]] = []
    for some in taken(notes):
        notes.append(-1)
        given.append(some)
    assert [len(some) for some in given] == [FOLD_NOTES, FOLD_NOTES, 1]
    assert [note for some in given for note in some] == list(range(2 * FOLD_NOTES + 1))
    assert list(notes) == [-1, -1, -1]
    large = [FOLD_PAIRS, 1, FOLD_PAIRS - 1, 5]
    assert list(taken(deque(large), lambda pairs: pairs)) == [[FOLD_PAIRS], [1, FOLD_PAIRS - 1], [5]]


def test_counting_survives_a_bug_in_what_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experts.counting.FOLD_EVERY_S", 0.001)
    called = threading.Semaphore(0)

    def broken(now_s: float) -> None:
        called.release()
        raise KeyError(now_s)

    counting = Counting(broken)
    counting.start()
    assert called.acquire(timeout=5) and called.acquire(timeout=5)
    counting.stop()
    assert not counting.is_alive()


def test_waits_and_computing_are_timed_by_batch(server: ServerStub, replica: ExpertMetrics) -> None:
    server.note(1, np.zeros(5, np.int32), wait_s=0.0)
    server.note(3, np.zeros(5, np.int32), wait_s=0.25)
    replica.fold(1.0)
    families = list(replica.collect())
    assert values(families, "expertmesh_expert_wait_seconds_sum") == {("1",): 0.25}
    assert values(families, "expertmesh_expert_compute_seconds_sum") == {("1",): 1.0}
    assert values(families, "expertmesh_expert_compute_seconds_count") == {("1",): 2}


def test_what_a_server_counts_itself_is_shown_and_known_reasons_begin_at_zero(replica: ExpertMetrics) -> None:
    families = list(replica.collect())
    assert values(families, "expertmesh_nacks_total") == {("1",): 2}
    refused = values(families, "expertmesh_links_refused_total")
    assert refused[("stalled",)] == 1
    assert refused[("handshake",)] == 0


@pytest.mark.parametrize("num_groups", [1, 2, 4, 8])
def test_routing_counts_are_those_of_the_plain_functions(num_groups: int) -> None:
    counts, rng = RoutingCounts(SHAPE, num_groups=num_groups), np.random.default_rng(num_groups)
    seen: dict[int, list[torch.Tensor]] = {layer: [] for layer in SHAPE.moe_layers}
    for i in range(100):
        logits = logits_of(int(rng.integers(1, 40)), i)
        layer = int(rng.choice(SHAPE.moe_layers))
        chosen = chosen_of(logits)
        decide(counts, layer, logits, chosen)
        seen[layer].append(torch.from_numpy(chosen))
    counts.fold()
    fanout = torch.zeros(num_groups + 1, dtype=torch.int64)
    for i, layer in enumerate(SHAPE.moe_layers):
        topk_idx = torch.cat(seen[layer])
        assert counts.sums.tokens[i] == len(topk_idx)
        assert counts.sums.selected[i].tolist() == expert_load(topk_idx, num_experts=32).tolist()
        rows = group_rows(topk_idx, num_experts=32, num_groups=num_groups)
        assert counts.sums.rows[i].tolist() == rows.tolist()
        visited = [len({int(e) // (32 // num_groups) for e in token}) for token in topk_idx]
        fanout += torch.bincount(torch.tensor(visited), minlength=num_groups + 1)
    assert counts.fanout.tolist() == fanout.tolist()


def test_a_counted_gate_decides_as_before() -> None:
    decided = chosen_of(logits_of(7, 1)), np.ones((7, 6), np.float32)
    asked: list[tuple[object, ...]] = []

    def gate(*arguments: object) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        asked.append(arguments)
        return decided

    counts, logits = RoutingCounts(SHAPE, num_groups=4), logits_of(7, 1)
    assert counts.counted(gate)(3, logits, DType.FLOAT32, 2.0) is decided
    counts.fold()
    assert asked == [(3, logits, DType.FLOAT32, 2.0)]
    assert counts.sums.tokens.tolist() == [0, 7, 0]


@pytest.mark.parametrize("num_groups", [1, 2, 4, 8])
def test_balance_factors_are_the_plain_ones_where_every_token_is_sampled(num_groups: int) -> None:
    counts = RoutingCounts(SHAPE, num_groups=num_groups, sample_every=1)
    batches = [logits_of(num_tokens, num_tokens) + np.linspace(0, 2, 32, dtype=np.float32) for num_tokens in (1, 9, 64)]
    for logits in batches:
        decide(counts, 3, logits, chosen_of(logits))
    counts.fold()
    logits = np.concatenate(batches)
    scores, topk_idx = torch.softmax(torch.from_numpy(logits), dim=1), torch.from_numpy(chosen_of(logits))
    max_groups = min(SHAPE.topk_group, num_groups)
    plain = balance_factors(scores, topk_idx, num_groups=num_groups, max_groups=max_groups)
    ours = balance_factors_of(counts.in_window, max_groups=counts.max_groups)
    assert {level: by_layer[1] for level, by_layer in ours.items()} == pytest.approx(
        {level: float(factor) for level, factor in plain._asdict().items()}, rel=1e-5
    )
    loads = {"expert": expert_load(topk_idx, num_experts=32), "group": counts.in_window.rows[1]}
    assert balancedness_of(counts.in_window.selected)[1] == pytest.approx(float(balancedness(loads["expert"])))
    assert balancedness_of(counts.in_window.rows)[1] == pytest.approx(
        float(balancedness(torch.from_numpy(loads["group"])))
    )
    assert all(math.isnan(by_layer[0]) for by_layer in ours.values()), "layer 1 has seen no token"


@pytest.mark.parametrize("num_layers", [1, 5, 26, 58, 61])
def test_every_layer_is_sampled_alike(num_layers: int) -> None:
    shape = replace(SHAPE, moe_layers=tuple(range(num_layers)))
    counts, logits = RoutingCounts(shape, num_groups=4), logits_of(1, 0)
    chosen = chosen_of(logits)
    for _ in range(3 * SAMPLE_EVERY):
        for layer in shape.moe_layers:
            decide(counts, layer, logits, chosen)
        counts.fold()
    assert counts.sums.sampled.tolist() == [3] * num_layers


def test_a_sampled_question_counts_by_its_tokens_and_not_by_how_many_were_looked_at() -> None:
    counts = RoutingCounts(SHAPE, num_groups=4, sample_every=1)
    large, small = np.tile(logits_of(1, 0), (10 * SAMPLE_TOKENS + 3, 1)), logits_of(5, 1)
    for logits in (large, small):
        decide(counts, 1, logits, chosen_of(logits))
    counts.fold()
    expected = affinities(large, scoring="softmax").sum(axis=0) + affinities(small, scoring="softmax").sum(axis=0)
    assert counts.sums.sampled[0] == len(large) + len(small)
    assert counts.sums.scores[0] == pytest.approx(expected, rel=1e-4)
    assert counts.sums.scores[0].sum() == pytest.approx(len(large) + len(small), rel=1e-5)


def test_a_token_without_finite_scores_is_not_sampled() -> None:
    counts = RoutingCounts(SHAPE, num_groups=4, sample_every=1)
    logits = logits_of(3, 0)
    logits[1] = np.nan
    decide(counts, 1, logits, chosen_of(logits))
    decide(counts, 1, logits[1:2], chosen_of(logits[1:2]))
    counts.fold()
    assert counts.sums.scores[0].sum() == pytest.approx(3)
    assert counts.sums.tokens[0] == 4


def test_affinities_of_a_token_add_up_to_one_whatever_the_gate_and_its_type() -> None:
    logits = torch.from_numpy(logits_of(20, 3))
    half = logits.to(torch.bfloat16)
    softmax = affinities(half.view(torch.uint16).numpy(), scoring="softmax")
    assert softmax == pytest.approx(torch.softmax(half.float(), dim=1).numpy(), rel=1e-5)
    sigmoid = affinities(logits.half().numpy(), scoring="sigmoid")
    plain = logits.half().float().sigmoid()
    assert sigmoid == pytest.approx((plain / plain.sum(dim=1, keepdim=True)).numpy(), rel=1e-5)


def test_the_window_forgets_what_is_older() -> None:
    counts, logits = RoutingCounts(SHAPE, num_groups=4), logits_of(10, 0)
    counts.move_window(1000.0)
    decide(counts, 1, logits, chosen_of(logits))
    counts.fold()
    for seconds in range(int(WINDOW_S)):
        counts.move_window(1000.0 + seconds)
        assert counts.in_window.tokens[0] == 10
    for seconds in range(int(WINDOW_S), int(WINDOW_S + 2 * MARK_EVERY_S)):
        counts.move_window(1000.0 + seconds)
    assert counts.in_window.tokens[0] == 0
    assert counts.sums.tokens[0] == 10


def test_a_router_that_was_busy_all_the_time_shows_a_minute_of_it() -> None:
    counts, logits = RoutingCounts(SHAPE, num_groups=4), logits_of(10, 0)
    chosen = chosen_of(logits)
    for tenths in range(3000):
        decide(counts, 1, logits, chosen)
        counts.fold()
        counts.move_window(1000.0 + tenths / 10)
        assert tenths < 700 or 600 * 10 <= counts.in_window.tokens[0] <= 660 * 10


def test_no_token_visits_more_groups_than_the_shape_lets_it() -> None:
    assert RoutingCounts(SHAPE, num_groups=8).max_groups == 3
    assert RoutingCounts(SHAPE, num_groups=2).max_groups == 2
    plain = MoEShape(moe_layers=(0,), hidden_size=8, moe_intermediate_size=8, num_experts=16, top_k=4)
    assert RoutingCounts(plain, num_groups=8).max_groups == 4
