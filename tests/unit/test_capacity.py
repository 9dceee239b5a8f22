"""Dispatch with a capacity factor: what is dropped is missing from the answer, and counted; nothing else changes."""

from dispatch_bench import Bench, logits_of, x_of

from experts.shape import MoEShape, RoutingMethod

SHAPE = MoEShape(
    moe_layers=(0,),
    hidden_size=8,
    moe_intermediate_size=4,
    num_experts=8,
    top_k=2,
    num_model_groups=2,
    topk_group=2,
    method=RoutingMethod.GROUP_LIMITED_GREEDY,
    grouped=True,
)
X, LOGITS = x_of(6, SHAPE, 1), logits_of(6, SHAPE, 1)


def test_rows_beyond_the_capacity_are_missing_from_the_answer_and_counted() -> None:
    whole, limited = Bench(SHAPE, num_groups=2), Bench(SHAPE, num_groups=2, capacity_factor=0.5)
    for bench in (whole, limited):
        bench.copies(1)
        bench.ask("a", X, LOGITS)
    rows = whole.dispatcher.counts["rows"]
    dropped = limited.dispatcher._jobs["a"].dropped_rows
    assert limited.dispatcher.counts["rows"] == rows > len(X)
    assert limited.dispatcher.counts["dropped_rows"] == dropped > 0 == whole.dispatcher.counts["dropped_rows"]
    assert sum(map(limited.rows_at, limited.replicas)) == rows - dropped
    whole.deliver_all()
    limited.deliver_all()
    changed = (whole.answers["a"] != limited.answers["a"]).any(axis=1)
    assert 0 < changed.sum() <= dropped
    limited.check_nothing_is_left()


def test_within_the_capacity_an_answer_is_what_it_was() -> None:
    answers = set[bytes]()
    for capacity_factor in (None, 2.0):
        bench = Bench(SHAPE, num_groups=2, capacity_factor=capacity_factor)
        bench.copies(1)
        bench.ask("a", X, LOGITS)
        bench.deliver_all()
        assert bench.dispatcher.counts["dropped_rows"] == 0
        answers.add(bench.answers["a"].tobytes())
    assert len(answers) == 1
