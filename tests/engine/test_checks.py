"""A vLLM, or a mode of it, that we do not know is refused by name, before anything of it is replaced.

In the test's own process: vLLM is imported here, but no engine is started.
"""

import enum
from types import SimpleNamespace

import pytest
import torch
import vllm
from torch import nn
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner import shared_experts
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.v1 import request
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler

from cluster.vllm_checks import check_vllm
from cluster.vllm_layer import RemoteExpertsMethod, check_config, check_model
from cluster.vllm_plugin import ACTIVATION_VARIABLE, register
from experts.shape import MoEShape

SHAPE = MoEShape(moe_layers=(1,), hidden_size=8, moe_intermediate_size=4, num_experts=4, top_k=2)
METHODS = [
    (RoutedExperts, "_get_quant_method"),
    (RoutedExperts, "load_weights"),
    (RoutedExperts, "forward_monolithic"),
    (FusedMoEMethodBase, "create_weights"),
    (FusedMoEMethodBase, "apply_monolithic"),
    (FusedMoEMethodBase, "get_fused_moe_quant_config"),
    (shared_experts.SharedExperts, "forward"),
    (DefaultModelLoader, "_init_ep_weight_filter"),
    (DefaultModelLoader, "get_all_weights"),
    (DefaultModelLoader, "load_model"),
    (Scheduler, "schedule"),
    (Scheduler, "update_from_output"),
    (Scheduler, "finish_requests"),
    (KVCacheManager, "get_block_ids"),
    (KVCacheManager, "evict_blocks"),
    (request.Request, "take_events"),
]


def test_the_installed_vllm_is_known() -> None:
    check_vllm()


@pytest.mark.parametrize("version", ["0.31.0", "0.32.1", "0.33.0+cpu", "1.0.0"])
def test_a_version_that_is_not_listed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(RuntimeError, match=f"vLLM {version.removesuffix('+cpu')} is not supported .* 0.32.0"):
        check_vllm()


def test_a_local_build_of_a_listed_version_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.32.0+cu130")
    check_vllm()


@pytest.mark.parametrize(("owner", "name"), METHODS, ids=lambda part: getattr(part, "__name__", part))
def test_a_changed_signature_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    def changed(self: object, other: object) -> None: ...

    monkeypatch.setattr(owner, name, changed)
    with pytest.raises(RuntimeError, match=rf"{name}.*'other'.* refuses to patch it"):
        check_vllm()


@pytest.mark.parametrize(("owner", "name"), METHODS, ids=lambda part: getattr(part, "__name__", part))
def test_a_method_that_is_gone_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    for base in owner.__mro__[:-1]:
        if name in vars(base):
            monkeypatch.delattr(base, name)
    with pytest.raises(RuntimeError, match=rf"vLLM 0.32.0: .*{name}.* refuses to patch it"):
        check_vllm()


def test_an_order_of_the_shared_experts_that_is_gone_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_experts, "SharedExpertsOrder", enum.Enum("SharedExpertsOrder", "NONE"))
    with pytest.raises(RuntimeError, match="SharedExpertsOrder.MK_INTERNAL_OVERLAPPED"):
        check_vllm()


def test_a_request_status_that_is_gone_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "RequestStatus", enum.Enum("RequestStatus", "RUNNING"))
    with pytest.raises(RuntimeError, match=r"RequestStatus\.FINISHED_ERROR"):
        check_vllm()


@pytest.mark.parametrize("name", ["is_monolithic", "mk_can_overlap_shared_experts"])
def test_a_property_that_became_a_method_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(FusedMoEMethodBase, name, lambda self: True)
    with pytest.raises(RuntimeError, match=f"FusedMoEMethodBase.{name} is a property"):
        check_vllm()


@pytest.mark.parametrize("value", [None, "0", "true"])
def test_the_plugin_does_nothing_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv(ACTIVATION_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(ACTIVATION_VARIABLE, value)
    monkeypatch.setattr(vllm, "__version__", "0.0.0")  # would be refused if it were looked at
    register()
    assert "RoutedExperts" not in op_registry_oot


def test_the_plugin_replaces_nothing_of_a_vllm_that_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ACTIVATION_VARIABLE, "1")
    monkeypatch.setattr(vllm, "__version__", "0.0.0")
    with pytest.raises(RuntimeError, match=r"vLLM 0\.0\.0 is not supported"):
        register()
    assert "RoutedExperts" not in op_registry_oot


def test_a_class_that_has_moved_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(shared_experts, "SharedExperts")
    with pytest.raises(RuntimeError, match="cannot import name 'SharedExperts'.* refuses to patch it"):
        check_vllm()


class Variant(RoutedExperts):
    """As a model of vLLM may have one."""


class RemoteVariant(Variant):
    """What a registration by name would make of it."""


class Unreplaced(RoutedExperts):
    """With expert weights of its own."""


def runner(layer_type: type[RoutedExperts], *, quant_method: object, weights: bool) -> MoERunner:
    """A layer as vLLM builds it, as far as it is looked at."""
    layer = object.__new__(layer_type)
    nn.Module.__init__(layer)
    layer.quant_method = quant_method  # type: ignore[assignment]
    layer.e_score_correction_bias = None
    if weights:
        layer.w13_weight = nn.Parameter(torch.zeros(1))
    found = object.__new__(MoERunner)
    nn.Module.__init__(found)
    found.layer_name = "model.layers.1.mlp.experts"
    found.routed_experts = layer
    return found


def test_a_variant_of_the_routed_experts_is_refused_by_name() -> None:
    model = nn.ModuleList([runner(RemoteVariant, quant_method=object.__new__(RemoteExpertsMethod), weights=False)])
    with pytest.raises(RuntimeError, match="RemoteVariant is a variant of the routed experts that is not supported"):
        check_model(model, SHAPE)


@pytest.mark.parametrize("weights", [False, True])
def test_a_layer_that_kept_its_experts_is_refused_by_name(weights: bool) -> None:
    method = object.__new__(RemoteExpertsMethod) if weights else object()
    model = nn.ModuleList([runner(Unreplaced, quant_method=method, weights=weights)])
    with pytest.raises(RuntimeError, match=r"model\.layers\.1\.mlp\.experts: Unreplaced still holds routed experts"):
        check_model(model, SHAPE)


def test_a_model_with_other_moe_layers_than_the_checkpoint_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"vLLM built MoE layers \[\], and the checkpoint has \[1\]"):
        check_model(nn.ModuleList(), SHAPE)


REFUSED = [
    ("parallel_config", "tensor_parallel_size", 2, "tensor_parallel_size > 1"),
    ("parallel_config", "pipeline_parallel_size", 2, "pipeline_parallel_size > 1"),
    ("parallel_config", "data_parallel_size", 2, "data_parallel_size > 1"),
    ("parallel_config", "enable_expert_parallel", True, "enable_expert_parallel"),
    ("parallel_config", "enable_eplb", True, "enable_eplb"),
    ("parallel_config", "distributed_executor_backend", "mp", "an executor other than uni"),
    ("model_config", "enforce_eager", False, "graph capture or compilation"),
    ("scheduler_config", "async_scheduling", True, "async scheduling"),
    ("aux_output_config", "enabled", True, "returning routed experts"),
    (None, "speculative_config", object(), "speculative decoding"),
    (None, "lora_config", object(), "LoRA"),
]


def config() -> SimpleNamespace:
    """The part of vLLM's config that is looked at, as engine_arguments asks for it."""
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            data_parallel_size=1,
            enable_expert_parallel=False,
            enable_eplb=False,
            distributed_executor_backend="uni",
        ),
        model_config=SimpleNamespace(enforce_eager=True),
        scheduler_config=SimpleNamespace(async_scheduling=False),
        aux_output_config=SimpleNamespace(enabled=False),
        speculative_config=None,
        lora_config=None,
    )


def test_the_mode_that_an_attention_replica_asks_for_is_accepted() -> None:
    check_config(config())  # type: ignore[arg-type]


@pytest.mark.parametrize(("section", "field", "value", "name"), REFUSED, ids=[case[3] for case in REFUSED])
def test_a_mode_in_which_remote_experts_would_be_wrong_is_refused_by_name(
    section: str | None, field: str, value: object, name: str
) -> None:
    given = config()
    setattr(getattr(given, section) if section else given, field, value)
    with pytest.raises(RuntimeError, match=f"does not support {name}"):
        check_config(given)  # type: ignore[arg-type]
