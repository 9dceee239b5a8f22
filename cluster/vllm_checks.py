"""What we rely on inside vLLM, checked by name before anything of it is replaced (DESIGN.md section 8, item 7)."""

import inspect
from collections.abc import Callable

SUPPORTED_VERSIONS = ("0.32.0",)


def check_vllm() -> None:
    """Raises RuntimeError that names the first thing which is not as expected."""
    import vllm

    version = vllm.__version__.partition("+")[0]
    if version not in SUPPORTED_VERSIONS:
        raise RuntimeError(f"vLLM {version} is not supported by expertmesh; install {' or '.join(SUPPORTED_VERSIONS)}")
    for name, function, parameters in _expected_signatures():
        found = tuple(inspect.signature(function).parameters)
        if found[: len(parameters)] != parameters:
            raise RuntimeError(
                f"vLLM {version}: {name}{found} is not the known {name}{parameters}; expertmesh refuses to patch it"
            )
    _check_members(version)


def _expected_signatures() -> list[tuple[str, Callable[..., object], tuple[str, ...]]]:
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase as Method
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExperts
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader as Loader
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler

    weights = ("self", "layer", "num_experts", "hidden_size", "intermediate_size_per_partition", "params_dtype")
    return [
        (
            "RoutedExperts._get_quant_method",
            RoutedExperts._get_quant_method,
            ("self", "prefix", "quant_config", "moe_config"),
        ),
        ("RoutedExperts.load_weights", RoutedExperts.load_weights, ("self", "weights")),
        (
            "RoutedExperts.forward_monolithic",
            RoutedExperts.forward_monolithic,
            ("self", "x", "router_logits", "input_ids"),
        ),
        ("FusedMoEMethodBase.__init__", Method.__init__, ("self", "moe")),
        ("FusedMoEMethodBase.create_weights", Method.create_weights, weights),
        (
            "FusedMoEMethodBase.apply_monolithic",
            Method.apply_monolithic,
            ("self", "layer", "x", "router_logits", "input_ids"),
        ),
        ("FusedMoEMethodBase.get_fused_moe_quant_config", Method.get_fused_moe_quant_config, ("self", "layer")),
        ("SharedExperts.forward", SharedExperts.forward, ("self", "shared_experts_input", "order")),
        ("DefaultModelLoader._init_ep_weight_filter", Loader._init_ep_weight_filter, ("self", "model_config")),
        ("DefaultModelLoader.get_all_weights", Loader.get_all_weights, ("self", "model_config", "model")),
        ("BaseModelLoader.load_model", BaseModelLoader.load_model, ("self", "vllm_config", "model_config", "prefix")),
        ("Scheduler.schedule", Scheduler.schedule, ("self",)),
        (
            "Scheduler.update_from_output",
            Scheduler.update_from_output,
            ("self", "scheduler_output", "model_runner_output"),
        ),
        ("Scheduler.finish_requests", Scheduler.finish_requests, ("self", "request_ids", "finished_status")),
        ("KVCacheManager.get_block_ids", KVCacheManager.get_block_ids, ("self", "request_id")),
        ("KVCacheManager.evict_blocks", KVCacheManager.evict_blocks, ("self", "block_ids")),
    ]


def _check_members(version: str) -> None:
    from vllm.model_executor.custom_op import PluggableLayer
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExpertsOrder
    from vllm.v1.request import RequestStatus

    expected = {
        "RoutedExperts is a PluggableLayer": issubclass(RoutedExperts, PluggableLayer),
        "SharedExpertsOrder.MK_INTERNAL_OVERLAPPED": hasattr(SharedExpertsOrder, "MK_INTERNAL_OVERLAPPED"),
        "FusedMoEMethodBase.is_monolithic is a property": isinstance(
            inspect.getattr_static(FusedMoEMethodBase, "is_monolithic"), property
        ),
        "FusedMoEMethodBase.mk_can_overlap_shared_experts is a property": isinstance(
            inspect.getattr_static(FusedMoEMethodBase, "mk_can_overlap_shared_experts"), property
        ),
        "RequestStatus.FINISHED_ERROR": hasattr(RequestStatus, "FINISHED_ERROR"),
    }
    for what, holds in expected.items():
        if not holds:
            raise RuntimeError(f"vLLM {version}: it does not hold any more that {what}; expertmesh refuses to patch it")
