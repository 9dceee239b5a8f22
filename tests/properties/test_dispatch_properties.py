"""The whole trip without sockets: routed equals dense, and no fault on the way changes a bit of the answer."""

from dataclasses import replace

import numpy as np
from dispatch_bench import Bench, dense_answer, logits_of, x_of
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.shape import MoEShape, RoutingMethod

CHECKED = settings(deadline=None, derandomize=True, max_examples=25)

V2 = MoEShape(
    moe_layers=(0,),
    hidden_size=8,
    moe_intermediate_size=4,
    num_experts=16,
    top_k=4,
    num_model_groups=8,
    topk_group=3,
    method=RoutingMethod.GROUP_LIMITED_GREEDY,
    grouped=True,
)
SHAPES = {
    "V2": V2,
    "V2 with norm": replace(V2, norm_topk_prob=True),
    "V3": replace(V2, method=RoutingMethod.NOAUX_TC, scoring="sigmoid", norm_topk_prob=True),
    "V2-Lite": replace(V2, num_model_groups=1, topk_group=1, method=RoutingMethod.GREEDY),
    "Qwen3": replace(
        V2, num_model_groups=1, topk_group=1, method=RoutingMethod.GREEDY, norm_topk_prob=True, grouped=False
    ),
    "Mixtral": replace(
        V2,
        num_experts=8,
        top_k=2,
        num_model_groups=1,
        topk_group=1,
        method=RoutingMethod.GREEDY,
        norm_topk_prob=True,
        grouped=False,
    ),
}
shapes = st.sampled_from(sorted(SHAPES)).map(SHAPES.__getitem__)


@CHECKED
@given(shape=shapes, num_groups=st.sampled_from([1, 2, 4, 8]), num_tokens=st.integers(1, 12), seed=st.integers(0, 99))
def test_routed_equals_dense(shape: MoEShape, num_groups: int, num_tokens: int, seed: int) -> None:
    bench = Bench(shape, num_groups=num_groups)
    bench.copies(1)
    scale = 2.5 if shape.grouped else 1.0
    x, logits = x_of(num_tokens, shape, seed), logits_of(num_tokens, shape, seed)
    bench.ask("a", x, logits, scale=scale)
    bench.deliver_all()
    expected = dense_answer(bench, x, logits, scale=scale)
    np.testing.assert_allclose(bench.answers["a"], expected, rtol=0, atol=2e-6 * max(1.0, np.abs(expected).max()))


@CHECKED
@given(
    num_groups=st.sampled_from([2, 4, 8]),
    num_copies=st.integers(1, 3),
    seed=st.integers(0, 2**31),
    lost=st.sampled_from([0.0, 0.5, 0.9]),
    doubled=st.sampled_from([0.0, 0.3]),
)
def test_no_order_double_loss_or_choice_of_copy_changes_a_bit_of_the_answer(
    num_groups: int, num_copies: int, seed: int, lost: float, doubled: float
) -> None:
    plain = Bench(V2, num_groups=num_groups)
    plain.copies(1)
    faulty = Bench(V2, num_groups=num_groups, seed=seed, doubled=doubled)
    # The first copies lose answers, the last one never does: then an answer must come.
    faulty.copies(num_copies)
    faulty.lossy = {r.member_id: lost for r in faulty.replicas if not r.member_id.endswith(f".{num_copies - 1}")}
    for asker in ("a", "b", "c"):
        x, logits = x_of(9, V2, seed % 1000 + ord(asker)), logits_of(9, V2, seed % 1000 + ord(asker))
        plain.ask(asker, x, logits)
        faulty.ask(asker, x, logits, budget_s=60)
    plain.deliver_all()
    for _ in range(num_copies + 1):
        faulty.deliver_all()
        faulty.tick(1.1)
    assert not faulty.failures
    assert faulty.answers.keys() == plain.answers.keys()
    for asker, answer in plain.answers.items():
        assert faulty.answers[asker].tobytes() == answer.tobytes()
    faulty.deliver_all()
    faulty.check_nothing_is_left()


@CHECKED
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_no_sequence_of_events_loses_a_question_or_leaves_rows_behind(data: st.DataObject, seed: int) -> None:
    """Copies come and go, links break in the middle of a send, replicas refuse; in the end all are back."""
    bench = Bench(V2, num_groups=2, seed=seed, doubled=0.2)
    bench.copies(2)
    asked: set[str] = set()
    for step in range(data.draw(st.integers(5, 25))):
        event = data.draw(st.sampled_from(["ask", "deliver", "down", "up", "nack", "break", "tick", "move", "gone"]))
        replica = data.draw(st.sampled_from(bench.replicas))
        if event == "ask":
            asker = f"asker {step}"
            asked.add(asker)
            bench.ask(asker, x_of(5, V2, step), logits_of(5, V2, step), budget_s=1000)
        elif event == "deliver":
            bench.deliver()
        elif event == "down":
            bench.down(replica)
        elif event == "up":
            bench.up(replica)
        elif event == "nack":
            bench.refusing ^= {replica.member_id}
        elif event == "break":
            bench.breaking.add(replica)
        elif event == "tick":
            bench.tick(0.7)
        elif event == "move":
            bench.publish()
        elif event == "gone" and asked - bench.answers.keys():
            gone = sorted(asked - bench.answers.keys())[0]
            bench.dispatcher.on_asker_gone(gone)
            asked.discard(gone)
    bench.refusing.clear()
    bench.breaking.clear()
    for replica in bench.replicas:
        bench.up(replica)
    for _ in range(4):
        bench.deliver_all()
        bench.tick(1.1)
    assert not bench.failures
    assert bench.answers.keys() == asked
    plain = Bench(V2, num_groups=2)
    plain.copies(1)
    for asker in asked:
        step = int(asker.split()[1])
        plain.ask(asker, x_of(5, V2, step), logits_of(5, V2, step))
        plain.deliver_all()
        assert bench.answers[asker].tobytes() == plain.answers[asker].tobytes()
    bench.check_nothing_is_left()
