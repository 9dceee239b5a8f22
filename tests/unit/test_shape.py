"""The MoE part of a config.json in numbers, and which of them are refused."""

import pytest

from experts.errors import ConfigError
from experts.shape import MoEShape, RoutingMethod, routing_of

V2 = {
    "model_type": "deepseek_v2",
    "n_routed_experts": 160,
    "num_experts_per_tok": 6,
    "n_group": 8,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": False,
}


def shape(**changes: object) -> MoEShape:
    fields: dict[str, object] = {
        "moe_layers": (1, 2),
        "hidden_size": 16,
        "moe_intermediate_size": 8,
        "num_experts": 32,
        "top_k": 6,
        "num_model_groups": 8,
        "topk_group": 3,
    }
    return MoEShape(**(fields | changes))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("num_groups", [1, 2, 4, 8])
def test_homes_are_fixed_runs_that_cover_every_expert_once(num_groups: int) -> None:
    homes = [shape().home_experts(group, num_groups) for group in range(num_groups)]
    assert [expert for home in homes for expert in home] == list(range(32))
    assert len({len(home) for home in homes}) == 1


def test_a_model_group_is_never_split() -> None:
    for num_groups in (1, 2, 4, 8):
        for group in range(num_groups):
            home = shape().home_experts(group, num_groups)
            assert home.start % shape().experts_per_model_group == 0


@pytest.mark.parametrize("num_groups", [0, -1, 3, 16, 32])
def test_groups_that_do_not_divide_n_group_are_refused_with_those_that_do(num_groups: int) -> None:
    with pytest.raises(ConfigError, match=r"n_group \(8\); set it to one of 1, 2, 4, 8"):
        shape().check_num_groups(num_groups)


def test_a_model_without_groups_is_split_along_its_experts() -> None:
    plain = shape(num_model_groups=1, topk_group=1)
    plain.check_num_groups(16)
    with pytest.raises(ConfigError, match=r"the number of routed experts \(32\); set it to one of 1, 2, 4, 8, 16, 32"):
        plain.check_num_groups(12)


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [
        ({"num_experts": 33}, "self.num_experts=33 .* self.num_model_groups=8"),
        ({"topk_group": 9}, "self.topk_group=9"),
        ({"topk_group": 0}, "self.topk_group=0"),
        ({"top_k": 13}, "self.top_k=13 must be between 1 and the 12 experts"),
        ({"top_k": 0}, "self.top_k=0"),
    ],
)
def test_numbers_that_do_not_fit_together_are_refused_by_name(changes: dict[str, object], numbers: str) -> None:
    with pytest.raises(ConfigError, match=numbers):
        shape(**changes)


def test_only_noaux_tc_has_a_bias() -> None:
    assert [method for method in RoutingMethod if shape(method=method).uses_bias] == [RoutingMethod.NOAUX_TC]


def test_the_routing_of_v2_is_read_from_its_config() -> None:
    assert routing_of(V2) == {
        "num_experts": 160,
        "top_k": 6,
        "num_model_groups": 8,
        "topk_group": 3,
        "method": RoutingMethod.GROUP_LIMITED_GREEDY,
        "scoring": "softmax",
        "norm_topk_prob": False,
        "grouped": True,
    }


def test_v3_v2_lite_qwen_and_mixtral_are_told_apart() -> None:
    v3 = routing_of({**V2, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True})
    assert (v3["method"], v3["scoring"], v3["norm_topk_prob"]) == (RoutingMethod.NOAUX_TC, "sigmoid", True)
    lite = routing_of({**V2, "topk_method": "greedy", "n_group": 1, "topk_group": 1})
    assert (lite["method"], lite["num_model_groups"], lite["grouped"]) == (RoutingMethod.GREEDY, 1, True)
    qwen = routing_of({"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True})
    assert (qwen["method"], qwen["grouped"], qwen["norm_topk_prob"]) == (RoutingMethod.GREEDY, False, True)
    mixtral = routing_of({"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2})
    assert (mixtral["num_experts"], mixtral["top_k"], mixtral["norm_topk_prob"]) == (8, 2, True)


def test_groups_without_a_method_are_limited_by_groups() -> None:
    named = {key: value for key, value in V2.items() if key != "topk_method"}
    assert routing_of(named)["method"] is RoutingMethod.GROUP_LIMITED_GREEDY


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"topk_method": "sinkhorn"},
            "topk_method 'sinkhorn' is not supported; greedy, group_limited_greedy, noaux_tc",
        ),
        ({"topk_method": "greedy"}, "topk_method greedy with n_group 8"),
        ({"scoring_func": "tanh"}, "scoring_func 'tanh' is not supported; softmax and sigmoid are"),
        ({"num_experts_per_tok": "six"}, "num_experts_per_tok is 'six', and must be a positive whole number"),
        ({"num_experts_per_tok": True}, "num_experts_per_tok is True"),
        ({"n_routed_experts": 0}, "n_routed_experts is 0"),
        ({"n_group": -8}, "n_group is -8"),
        ({"n_routed_experts": None}, "this is not a mixture-of-experts checkpoint"),
    ],
)
def test_what_we_do_not_know_is_refused_by_name(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        routing_of({**V2, **changes})
