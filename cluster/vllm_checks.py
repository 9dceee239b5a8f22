"""What we rely on inside vLLM, checked by name before anything of it is replaced."""

import inspect

SUPPORTED_VERSIONS = ("0.32.0",)


def check_vllm() -> None:
    """Raises RuntimeError that names the first thing which is not as expected."""
    import vllm

    version = vllm.__version__.partition("+")[0]
    if version not in SUPPORTED_VERSIONS:
        raise RuntimeError(f"vLLM {version} is not supported by expertmesh; install {' or '.join(SUPPORTED_VERSIONS)}")
    try:
        for owner, name, parameters in _expected_signatures():
            _check_signature(version, owner, name, parameters)
        _check_members(version)
    except ImportError as error:
        raise RuntimeError(f"vLLM {version}: {error}; expertmesh refuses to patch it") from None


def _check_signature(version: str, owner: type, name: str, parameters: tuple[str, ...]) -> None:
    function = getattr(owner, name, None)
    found = inspect.signature(function).parameters if callable(function) else {}
    # A new parameter at the end does no harm as long as nobody has to give it.
    added = list(found.values())[len(parameters) :]
    demanded = [p for p in added if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if tuple(found)[: len(parameters)] != parameters or demanded:
        raise RuntimeError(
            f"vLLM {version}: {owner.__name__}.{name} has the parameters {tuple(found)}, "
            f"and the known one has {parameters}; expertmesh refuses to patch it"
        )


def _expected_signatures() -> list[tuple[type, str, tuple[str, ...]]]:
    """Owner, name of the method, its first parameters."""
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase as Method
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExperts
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader as Loader
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

    weights = ("self", "layer", "num_experts", "hidden_size", "intermediate_size_per_partition", "params_dtype")
    return [
        (RoutedExperts, "_get_quant_method", ("self", "prefix", "quant_config", "moe_config")),
        (RoutedExperts, "load_weights", ("self", "weights")),
        (RoutedExperts, "forward_monolithic", ("self", "x", "router_logits", "input_ids")),
        (Method, "__init__", ("self", "moe")),
        (Method, "create_weights", weights),
        (Method, "apply_monolithic", ("self", "layer", "x", "router_logits", "input_ids")),
        (Method, "get_fused_moe_quant_config", ("self", "layer")),
        (SharedExperts, "forward", ("self", "shared_experts_input", "order")),
        (Loader, "_init_ep_weight_filter", ("self", "model_config")),
        (Loader, "get_all_weights", ("self", "model_config", "model")),
        (Loader, "load_model", ("self", "vllm_config", "model_config", "prefix")),
        (Scheduler, "schedule", ("self",)),
        (Scheduler, "update_from_output", ("self", "scheduler_output", "model_runner_output")),
        (Scheduler, "finish_requests", ("self", "request_ids", "finished_status")),
        (KVCacheManager, "get_block_ids", ("self", "request_id")),
        (KVCacheManager, "evict_blocks", ("self", "block_ids")),
        (Scheduler, "add_request", ("self", "request")),
        (Request, "append_output_token_ids", ("self", "token_ids")),
        (CachedRequestState, "__post_init__", ("self",)),
        (TopKTopPSampler, "forward_native", ("self", "logits", "generators", "k", "p")),
        (TopKTopPSampler, "forward_cpu", ("self", "logits", "generators", "k", "p")),
        (Request, "get_finished_reason", ("self",)),
        (Request, "take_events", ("self",)),
    ]


def _check_members(version: str) -> None:
    from vllm.config import SchedulerConfig
    from vllm.model_executor.custom_op import PluggableLayer
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExpertsOrder
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.request import RequestStatus

    expected = {
        "RoutedExperts is a PluggableLayer": issubclass(RoutedExperts, PluggableLayer),
        "there is SharedExpertsOrder.MK_INTERNAL_OVERLAPPED": hasattr(SharedExpertsOrder, "MK_INTERNAL_OVERLAPPED"),
        "there is RequestStatus.FINISHED_ERROR": hasattr(RequestStatus, "FINISHED_ERROR"),
        "there is EngineCoreOutput.routed_experts": "routed_experts" in EngineCoreOutput.__struct_fields__,
        "there is CompletionOutput.routed_experts": "routed_experts" in CompletionOutput.__dataclass_fields__,
        "there is SchedulerConfig.max_num_scheduled_tokens": hasattr(SchedulerConfig, "max_num_scheduled_tokens"),
    }
    for name in ("is_monolithic", "mk_can_overlap_shared_experts"):
        found = inspect.getattr_static(FusedMoEMethodBase, name, None)
        expected[f"FusedMoEMethodBase.{name} is a property"] = isinstance(found, property)
    for what, holds in expected.items():
        if not holds:
            raise RuntimeError(f"vLLM {version}: it does not hold any more that {what}; expertmesh refuses to patch it")
