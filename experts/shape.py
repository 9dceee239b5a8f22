"""The MoE part of a checkpoint in numbers: how many experts, how wide, how they are grouped and chosen."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from experts.errors import ConfigError


class RoutingMethod(StrEnum):
    """How a token's experts are chosen from its gate logits; names as in the checkpoints' config.json."""

    GREEDY = "greedy"  # plain top-k
    GROUP_LIMITED_GREEDY = "group_limited_greedy"  # DeepSeek-V2, section 2.2.2: a group is worth its best expert
    NOAUX_TC = "noaux_tc"  # DeepSeek-V3, section 2.1.2: selection by score + bias, a group is worth its best two


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEShape:
    """Everything that routing, planning and expert compute must know of a model; nothing of its attention."""

    moe_layers: tuple[int, ...]  # indices of the layers that have routed experts, ascending
    hidden_size: int
    moe_intermediate_size: int
    num_experts: int
    top_k: int
    num_model_groups: int = 1  # the checkpoint's n_group
    topk_group: int = 1  # model groups that one token may visit
    method: RoutingMethod = RoutingMethod.GREEDY
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = False
    grouped: bool = False  # vLLM's grouped code path: scores in float32 even where the logits are not

    def __post_init__(self) -> None:
        if self.num_experts % self.num_model_groups:
            raise ConfigError(f"{self.num_experts=} must be a multiple of {self.num_model_groups=}")
        if not 0 < self.topk_group <= self.num_model_groups:
            raise ConfigError(f"{self.topk_group=} must be between 1 and {self.num_model_groups=}")
        selectable = self.topk_group * self.num_experts // self.num_model_groups
        if not 0 < self.top_k <= selectable:
            raise ConfigError(f"{self.top_k=} must be between 1 and the {selectable} experts of topk_group groups")

    @property
    def experts_per_model_group(self) -> int:
        return self.num_experts // self.num_model_groups

    @property
    def uses_bias(self) -> bool:
        return self.method is RoutingMethod.NOAUX_TC

    def check_num_groups(self, num_groups: int) -> None:
        """Refuses a number of expert groups D that cannot split the experts evenly along the model groups."""
        unit = self.num_model_groups if self.num_model_groups > 1 else self.num_experts
        name = "n_group" if self.num_model_groups > 1 else "the number of routed experts"
        if num_groups < 1 or unit % num_groups:
            fitting = [d for d in range(1, unit + 1) if unit % d == 0]
            raise ConfigError(
                f"experts.groups is {num_groups}, which does not divide {name} ({unit}); "
                f"set it to one of {', '.join(map(str, fitting))}"
            )

    def home_experts(self, group: int, num_groups: int) -> range:
        """Global ids of the experts at home in `group` of `num_groups`: a fixed run, in order."""
        per_group = self.num_experts // num_groups
        return range(group * per_group, (group + 1) * per_group)


def routing_of(config: Mapping[str, object]) -> dict[str, object]:
    """The routing fields of MoEShape, read from a checkpoint's config.json.

    Follows what vLLM does for the same file (it is the reference): models with `n_group`
    go through its grouped path, whatever `topk_method` says; `norm_topk_prob` is obeyed where it is written.

    Raises ConfigError for a method, a scoring function or a field that we do not know.
    """
    scoring = config.get("scoring_func") or "softmax"
    if scoring not in ("softmax", "sigmoid"):
        raise ConfigError(f"config.json: scoring_func {scoring!r} is not supported; softmax and sigmoid are")
    grouped = "n_group" in config or "topk_method" in config
    num_model_groups = _int(config, ("n_group",), default=1)
    name = config.get("topk_method")
    if name is None:
        name = "group_limited_greedy" if num_model_groups > 1 else "greedy"
    try:
        method = RoutingMethod(str(name))
    except ValueError:
        known = ", ".join(RoutingMethod)
        raise ConfigError(f"config.json: topk_method {name!r} is not supported; {known} are") from None
    if method is RoutingMethod.GREEDY and num_model_groups > 1:
        raise ConfigError(
            f"config.json: topk_method greedy with n_group {num_model_groups}: vLLM would route it by groups; "
            "set n_group and topk_group to 1, or topk_method to group_limited_greedy"
        )
    return {
        "num_experts": _int(config, ("n_routed_experts", "num_experts", "num_local_experts")),
        "top_k": _int(config, ("num_experts_per_tok",)),
        "num_model_groups": num_model_groups,
        "topk_group": _int(config, ("topk_group",), default=1),
        "method": method,
        "scoring": scoring,
        "norm_topk_prob": bool(config.get("norm_topk_prob", config.get("model_type") in _ALWAYS_NORMALISED)),
        "grouped": grouped,
    }


# Models whose config.json has no norm_topk_prob although their weights are always renormalised.
_ALWAYS_NORMALISED = frozenset({"mixtral"})


def _int(config: Mapping[str, object], names: tuple[str, ...], *, default: int | None = None) -> int:
    for name in names:
        value = config.get(name)
        if value is not None:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"config.json: {name} is {value!r}, and must be a positive whole number")
            return value
    if default is None:
        raise ConfigError(f"config.json has none of {', '.join(names)}: this is not a mixture-of-experts checkpoint")
    return default
