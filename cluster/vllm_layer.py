"""Routed experts that live elsewhere: what stands in vLLM's models for them, and a loader that leaves them on disk.

vLLM keeps the gate, the shared experts, the scaling and the sum; which experts a token visits is the router's to say.
"""

import dataclasses
import re
from collections.abc import Generator, Iterable
from contextlib import nullcontext
from typing import cast

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig, get_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExpertsOrder
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from cluster.engine_link import EngineLink, EngineLinkOptions, open_link
from cluster.engine_memory import keep_freed_memory
from cluster.vllm_plugin import LOAD_FORMAT
from experts.gently import give_way
from experts.shape import MoEShape

# `.experts.<n>.` and fused `.experts.gate_up_proj`; `.shared_experts.` is not one of them.
_ROUTED_EXPERT = re.compile(r"\.experts\.")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


class RemoteExpertsMethod(FusedMoEMethodBase):
    """Allocates nothing, and computes a layer by asking the router."""

    link: EngineLink | None = None  # one for the process, set once the model is loaded

    @property
    def is_monolithic(self) -> bool:
        return True  # the runner hands over the gate's logits, not experts it chose

    @property
    def mk_can_overlap_shared_experts(self) -> bool:
        return True  # the runner leaves it to us when the shared experts run

    def create_weights(self, layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **extra):
        layer.expertmesh_width = intermediate_size_per_partition

    def get_fused_moe_quant_config(self, layer):
        return None

    def process_weights_after_loading(self, layer):
        pass

    def apply_monolithic(self, layer, x, router_logits, input_ids=None):
        """x: [num_tokens, hidden_size] model dtype; router_logits: [num_tokens, num_experts]. A fresh tensor like x."""
        link = RemoteExpertsMethod.link
        assert link is not None, "the loader sets the link before the first forward pass"
        with link.helpers.parked() if x.device.type == "cpu" else nullcontext():
            link.client.ask(_layer_index(layer.layer_name), x, router_logits, scale=layer.routed_scaling_factor)
            # The shared experts are computed here while the routed ones are computed elsewhere.
            shared = get_forward_context().no_compile_layers[layer.layer_name]._shared_experts
            if shared is not None:
                shared(x, SharedExpertsOrder.MK_INTERNAL_OVERLAPPED)
            return link.client.answer(like=x)


class RemoteExpertsLoader(DefaultModelLoader):
    """Loads everything but the routed experts, which are not even read, and then reaches the router."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(dataclasses.replace(load_config, load_format="auto"))

    def _init_ep_weight_filter(self, model_config: ModelConfig) -> None:
        self.local_expert_ids = set()  # vLLM's own filter: none of the per-expert tensors is opened

    def get_all_weights(
        self, model_config: ModelConfig, model: nn.Module
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        # Expert tensors in other layouts pass vLLM's filter.
        return ((n, w) for n, w in super().get_all_weights(model_config, model) if not _ROUTED_EXPERT.search(n))

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        check_config(vllm_config)
        options = EngineLinkOptions.of(
            cast("dict[str, dict[str, object]]", vllm_config.additional_config)["expertmesh"]
        )
        give_way(options.niceness)
        model = super().load_model(vllm_config, model_config, prefix)
        link = open_link(options, model_config.dtype)
        check_model(model, link.shape)
        limit_steps(vllm_config, link.max_rows)
        link.client.connect(timeout_s=link.start_timeout_s)
        if vllm_config.device_config.device_type == "cpu":
            keep_freed_memory()
        RemoteExpertsMethod.link = link
        link.publish()
        return model


def register() -> None:
    """Registers the layer and the loader; a second call in the same process changes nothing."""
    if "RoutedExperts" in op_registry_oot:
        return

    @RoutedExperts.register_oot
    class RemoteExperts(RoutedExperts):
        def _get_quant_method(self, prefix, quant_config, moe_config):
            if get_current_vllm_config().load_config.load_format != LOAD_FORMAT:
                raise RuntimeError(f"an attention engine must be loaded with load_format {LOAD_FORMAT!r}")
            return RemoteExpertsMethod(moe_config)

        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[str]:
            for name, _ in weights:
                raise RuntimeError(f"{self.layer_name}: expert tensor {name} reached an attention engine")
            return ()

    register_model_loader(LOAD_FORMAT)(RemoteExpertsLoader)


def check_config(vllm_config: VllmConfig) -> None:
    """Refuses, by name, the modes of vLLM in which remote experts would be wrong or untested."""
    parallel = vllm_config.parallel_config
    refused = {
        "tensor_parallel_size > 1": parallel.tensor_parallel_size > 1,
        "pipeline_parallel_size > 1": parallel.pipeline_parallel_size > 1,
        "data_parallel_size > 1": parallel.data_parallel_size > 1,
        "enable_expert_parallel": parallel.enable_expert_parallel,
        "enable_eplb": parallel.enable_eplb,
        "speculative decoding": vllm_config.speculative_config is not None,
        "LoRA": vllm_config.lora_config is not None,
        "graph capture or compilation (set enforce_eager)": not vllm_config.model_config.enforce_eager,
        "async scheduling": bool(vllm_config.scheduler_config.async_scheduling),
        # Their place in an answer is taken, see cluster/drop_mark.py.
        "returning routed experts": vllm_config.aux_output_config.enabled,
        # Poison is handed from the worker to the scheduler inside one process.
        "an executor other than uni": parallel.distributed_executor_backend != "uni",
    }
    for what, found in refused.items():
        if found:
            raise RuntimeError(f"expertmesh does not support {what} in an attention engine yet")


def limit_steps(vllm_config: VllmConfig, max_rows: int) -> None:
    """Holds every step within what a frame may carry; the scheduler, made after the model, obeys it.

    vLLM raises max_num_batched_tokens by itself for latent attention on a CPU, so asking for less is not enough.
    """
    scheduler, max_model_len = vllm_config.scheduler_config, vllm_config.model_config.max_model_len
    if max_rows < max_model_len and not scheduler.enable_chunked_prefill:
        # Such a prompt would never be scheduled, and wait for ever.
        raise RuntimeError(f"{max_rows=} must be at least {max_model_len=}: a whole prompt is computed in one step")
    scheduler.max_num_scheduled_tokens = min(
        max_rows, scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
    )


def check_model(model: nn.Module, shape: MoEShape) -> None:
    """Raises RuntimeError unless exactly the MoE layers of the checkpoint are remote, and route as our router will."""
    runners = [module for module in model.modules() if isinstance(module, MoERunner)]
    found = sorted(_layer_index(runner.layer_name) for runner in runners)
    if found != list(shape.moe_layers):
        raise RuntimeError(f"vLLM built MoE layers {found}, and the checkpoint has {list(shape.moe_layers)}")
    for runner in runners:
        _check_layer(runner, shape)


def _check_layer(runner: MoERunner, shape: MoEShape) -> None:
    layer = runner.routed_experts
    name = runner.layer_name
    # The selection bias of the gate hangs on this layer, too; it is small, and the gate's own.
    held = [parameter for parameter in layer.parameters() if parameter is not layer.e_score_correction_bias]
    if type(layer.quant_method) is not RemoteExpertsMethod or held:
        raise RuntimeError(f"{name}: {type(layer).__name__} still holds routed experts")
    if type(layer).__mro__[1] is not RoutedExperts:
        raise RuntimeError(f"{name}: {type(layer).__name__} is a variant of the routed experts that is not supported")
    # vLLM's value, and what the router and the expert groups derived from the same checkpoint.
    pairs: dict[str, tuple[object, object]] = {
        "number of experts": (layer.global_num_experts, shape.num_experts),
        "hidden size": (layer.hidden_size, shape.hidden_size),
        "expert width": (layer.expertmesh_width, shape.moe_intermediate_size),
        "top_k": (layer.top_k, shape.top_k),
        "scoring function": (layer.scoring_func, shape.scoring),
        "norm_topk_prob": (layer.renormalize, shape.norm_topk_prob),
        "grouped routing": (layer.use_grouped_topk, shape.grouped),
        "n_group": (layer.num_expert_group or 1, shape.num_model_groups),
        "topk_group": (layer.topk_group or 1, shape.topk_group),
        "correction bias": (layer.e_score_correction_bias is not None, shape.uses_bias),
        "activation": (layer.activation.value, "silu"),
        "router weight on input": (bool(layer.apply_router_weight_on_input), False),
        "own routing function": (layer.custom_routing_function is not None, False),
        "input transform": (runner.routed_input_transform is not None, False),
        "fused shared experts": (getattr(layer.moe_config, "num_fused_shared_experts", 0) or 0, 0),
    }
    for what, (vllm_says, we_say) in pairs.items():
        if vllm_says != we_say:
            raise RuntimeError(f"{name}: {what} is {vllm_says} in vLLM, and {we_say} at the router and the experts")


def _layer_index(layer_name: str) -> int:
    match = _LAYER.search(layer_name)
    if match is None:
        raise RuntimeError(f"no layer number in {layer_name}")
    return int(match.group(1))
