"""Sizes follow from config.json: published totals, what transformers builds, and what our reader of weights holds."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deploy.checkpoint_presets import PRESETS
from deploy.config import EMBEDDED, DeploymentConfig
from deploy.model_size import ModelSize, group_counts
from deploy.sizing import GIB, MIB, PodSize, Sizing, pod_sizes
from deploy.sizing_page import MODEL_CONFIGS, Node, page, report
from experts.checkpoint import open_checkpoint
from experts.errors import ConfigError
from experts.shape import MoEShape
from experts.weights import bytes_needed

ROOT = Path(__file__).parents[2]
LITE, V2, V3 = "deepseek-v2-lite", "deepseek-v2", "deepseek-v3"
Json = Mapping[str, object]


def model(name: str, **changed: object) -> Json:
    return json.loads((MODEL_CONFIGS / f"{name}.json").read_text()) | changed


def size(name: str) -> ModelSize:
    return ModelSize.of(model(name))


def on_gpus(**sections: Json) -> DeploymentConfig:
    """DeepSeek-V2 as one would deploy it, but for what is given."""
    base: dict[str, dict[str, object]] = {
        "model": {"max_model_len": 4096},
        "attention": {"num_gpus": 1, "num_cpus": 4, "kv_cache_mib": 32768},
        "experts": {"groups": 8, "num_gpus": 1, "num_cpus": 4},
    }
    merged = {name: {**base.get(name, {}), **sections.get(name, {})} for name in base.keys() | sections.keys()}
    return DeploymentConfig.model_validate(merged)


def on_cpus(**sections: Json) -> DeploymentConfig:
    cpu = {"num_gpus": 0, "kv_cache_mib": 256}
    attention = cpu | dict(sections.pop("attention", {}))
    experts = {"num_gpus": 0, "num_cpus": 1, "groups": 4} | dict(sections.pop("experts", {}))
    served = {"max_model_len": 1024} | dict(sections.pop("model", {}))
    return on_gpus(model=served, attention=attention, experts=experts, **sections)


@pytest.mark.parametrize(("name", "published"), [(LITE, 15.7e9), (V2, 236e9), (V3, 671e9)])
def test_a_models_parameters_add_up_to_the_published_number(name: str, published: float) -> None:
    assert size(name).total == pytest.approx(published, rel=0.005)
    assert size(name).total == size(name).routed + size(name).rest


@pytest.mark.parametrize(("name", "expected"), [(LITE, 27 * 576 * 2), (V2, 69_120), (V3, 61 * 576 * 2)])
def test_a_token_takes_a_latent_vector_and_one_key_of_each_layer_in_the_cache(name: str, expected: int) -> None:
    assert size(name).kv_bytes_per_token("bfloat16") == expected
    assert size(name).kv_bytes_per_token("float32") == 2 * expected


def test_key_value_heads_are_cached_in_full_where_attention_is_not_latent() -> None:
    qwen = ModelSize.of({**PRESETS["qwen3-moe"].fields, "model_type": "qwen3_moe"})
    assert qwen.kv_bytes_per_token("bfloat16") == 4 * 2 * 2 * 64 * 2  # layers, keys and values, heads, head_dim, bytes


def test_an_eighth_of_deepseek_v2_is_twenty_experts_of_fifty_nine_layers() -> None:
    assert size(V2).group_bytes(8, "bfloat16") == 20 * 59 * (3 * 5120 * 1536) * 2


@pytest.mark.parametrize("name", [LITE, V2, V3])
def test_the_groups_of_every_split_hold_all_routed_experts_and_no_other_split_is_taken(name: str) -> None:
    it = size(name)
    splits = group_counts(it.shape)
    for groups in range(1, it.shape.num_experts + 2):
        if groups in splits:
            assert groups * it.group_bytes(groups, "bfloat16") == it.routed * 2
        else:
            with pytest.raises(ConfigError, match=f"experts.groups is {groups}"):
                it.group_bytes(groups, "bfloat16")


@pytest.mark.parametrize("name", [LITE, V2, V3, "qwen3-moe", "mixtral"])
def test_transformers_builds_a_model_of_as_many_parameters(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    family = {LITE: "DeepseekV2", V2: "DeepseekV2", V3: "DeepseekV3", "qwen3-moe": "Qwen3Moe", "mixtral": "Mixtral"}[
        name
    ]
    fields = dict(PRESETS[name].fields if name in PRESETS else model(name))
    config = getattr(transformers, f"{family}Config")(**fields)
    with torch.device("meta"):
        built = getattr(transformers, f"{family}ForCausalLM")(config)
    biases = (buffer for buffer_name, buffer in built.named_buffers() if buffer_name.endswith("correction_bias"))
    assert ModelSize.of(fields | {"model_type": config.model_type}).total == sum(
        tensor.numel() for tensor in (*built.parameters(), *biases)
    )


def test_a_checkpoints_tensors_have_the_shape_and_the_parameters_that_its_config_promises() -> None:
    checkpoint = open_checkpoint(EMBEDDED)
    it = ModelSize.of(checkpoint.config)
    assert it.shape == checkpoint.shape
    assert it.total == sum(torch.Size(tensor.shape).numel() for tensor in checkpoint.tensors.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_a_group_weighs_what_our_reader_of_weights_will_hold(groups: int, dtype: str) -> None:
    checkpoint = open_checkpoint(EMBEDDED)
    held, torch_dtype = checkpoint.shape.num_experts // groups, cast("torch.dtype", getattr(torch, dtype))
    it = ModelSize.of(checkpoint.config)
    assert it.group_bytes(groups, dtype) == bytes_needed(checkpoint, held, torch_dtype)
    for machine in (on_cpus, on_gpus):
        config = machine(model={"dtype": dtype, "max_model_len": 1024}, experts={"groups": groups})
        found = Sizing.of(config, checkpoint.config).experts.weights_bytes
        assert found == bytes_needed(checkpoint, held, torch_dtype)


def test_a_gpu_that_is_too_small_for_a_group_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        ConfigError, match=r"needs 103.7 GiB for weights .* 72.0 GiB of .* 80 GiB .*groups \(now 4\) to 8"
    ):
        pod_sizes(on_gpus(experts={"groups": 4}), model(V2))
    config = on_gpus(attention={"kv_cache_mib": 1024})
    with pytest.raises(ConfigError, match="lower model.max_model_len, or use GPUs of at least 175 GiB") as refused:
        pod_sizes(config, model(V3))
    assert "raise experts.groups" not in str(refused.value)  # eight is the most that its n_group allows
    assert pod_sizes(config, model(V3), gpu_memory_gib=175)["experts"].gpus == 1
    with pytest.raises(ConfigError):
        pod_sizes(config, model(V3), gpu_memory_gib=174)


def test_a_cache_that_is_too_large_is_refused_with_the_largest_that_fits() -> None:
    with pytest.raises(ConfigError, match="set attention.kv_cache_mib to at most (\\d+)") as refused:
        pod_sizes(on_gpus(attention={"kv_cache_mib": 65536}), model(V2))
    most = int(str(refused.value).rsplit(" ", 1)[1])
    assert pod_sizes(on_gpus(attention={"kv_cache_mib": most}), model(V2))
    with pytest.raises(ConfigError):
        pod_sizes(on_gpus(attention={"kv_cache_mib": most + 1}), model(V2))
    with pytest.raises(ConfigError, match="use GPUs with more memory"):
        pod_sizes(on_gpus(), model(V2), gpu_memory_gib=24)


def test_a_bound_of_copies_becomes_a_bound_of_pods() -> None:
    pods = pod_sizes(on_gpus(autoscale={"min_replicas": 2, "max_replicas": 3}), model(V2))
    assert (pods["experts"].replicas, pods["experts"].max_replicas) == (16, 24)
    elastic = on_gpus(attention={"max_replicas": 3}, router={"replicas": 3})
    assert (pod_sizes(elastic, model(V2))["attention"].max_replicas) == 3


def test_on_cpus_there_is_room_for_what_an_upgrade_replaces_at_a_time() -> None:
    pods = pod_sizes(on_cpus(gateway={"replicas": 2}, experts={"replicas": 2}), _embedded())
    assert (pods["experts"].replicas, pods["experts"].max_replicas) == (8, 8 + 2)
    assert (pods["attention"].replicas, pods["attention"].max_replicas) == (1, 2)
    assert (pods["gateway"].replicas, pods["gateway"].max_replicas) == (2, 4)


def test_a_pod_has_cpus_for_what_its_replicas_book_and_for_their_threads() -> None:
    config = on_cpus(
        gateway={"num_cpus": 1.5},
        attention={"num_cpus": 0.5, "threads": 3},
        router={"num_cpus": 1},
        experts={"num_cpus": 4, "threads": 2},
    )
    assert [pod.cpus for pod in pod_sizes(config, _embedded()).values()] == [2, 4, 4]


@given(
    rows=st.integers(16, 4096),
    copies=st.integers(1, 3),
    cache=st.integers(1, 4096),
    groups=st.sampled_from([1, 2, 4, 8]),
)
def test_a_pods_memory_covers_its_weights_and_its_shared_memory(
    rows: int, copies: int, cache: int, groups: int
) -> None:
    config = on_cpus(attention={"kv_cache_mib": cache}, experts={"replicas": copies, "groups": groups})
    config = config.model_copy(update={"model": config.model.model_copy(update={"max_model_len": rows})})
    pods = pod_sizes(config, _embedded())
    it = Sizing.of(config, _embedded())
    assert pods["attention"].memory_bytes > it.attention.total_bytes + cache * MIB
    assert pods["experts"].memory_bytes > it.experts.total_bytes
    for pod in pods.values():
        assert pod.object_store_bytes < pod.shm_bytes < pod.memory_bytes
        assert pod.memory_bytes % (256 * MIB) == 0 and pod.gpus == 0 < pod.replicas <= pod.max_replicas


def test_the_host_of_a_gpu_need_not_hold_what_the_gpu_does() -> None:
    pods = pod_sizes(on_gpus(), model(V2))
    for role in ("experts", "attention"):
        assert pods[role].memory_bytes < pods[role].weights_bytes / 2


def test_a_node_holds_as_many_pods_as_its_scarcest_resource_allows() -> None:
    pod = PodSize(
        replicas=1, max_replicas=1, cpus=4, memory_bytes=64 * GIB, gpus=1, shm_bytes=0, weights_bytes=0
    )  # fmt: skip
    assert Node(gpus=8, cpus=96, memory_gib=1024).holds(pod) == 8
    assert Node(gpus=8, cpus=96, memory_gib=200).holds(pod) == 3
    assert Node(gpus=8, cpus=7, memory_gib=200).holds(pod) == 1


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (on_gpus(attention={"max_replicas": 2}), "router.replicas is 1, and there may be 2 attention pods"),
        (on_gpus(experts={"num_gpus": 2}), "experts.num_gpus is 2, and a replica computes on one GPU"),
        (on_gpus(attention={"num_gpus": 0.5}), "attention.num_gpus is 0.5"),
        (on_gpus(experts={"num_gpus": 0, "num_cpus": 1, "threads": 2}), "set experts.num_cpus to 2"),
        (on_gpus(experts={"groups": 3}), "experts.groups is 3, which does not divide"),
        (on_gpus(model={"max_model_len": 200_000}), "max_model_len is 200000, and the model's context is 163840"),
    ],
)
def test_a_config_that_pods_can_not_carry_out_is_refused(config: DeploymentConfig, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        pod_sizes(config, model(V2))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"hidden_size": None}, "hidden_size is None, and must be a whole number of at least 1"),
        ({"moe_layer_freq": 0}, "moe_layer_freq is 0"),
        ({"first_k_dense_replace": 60}, "none of the 60 layers routed experts"),
        ({"quantization_config": {"quant_method": "fp8"}}, "use an unquantised version"),
        ({"torch_dtype": None}, "config.json names no dtype"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype is float8_e4m3fn, and must be one of float32, bfloat16, float16"),
    ],
)
def test_a_config_json_that_can_not_be_sized_is_refused(changed: Json, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        pod_sizes(on_gpus(), model(V2, **changed))


@pytest.mark.parametrize("name", [LITE, V2, V3])
def test_a_kept_config_json_is_one_that_we_serve(name: str) -> None:
    it = size(name)
    assert it.dtype == "bfloat16" and it.context == 163_840
    assert len(it.shape.moe_layers) < it.num_layers
    assert isinstance(it.shape, MoEShape) and it.shape.num_experts % it.shape.num_model_groups == 0


def test_a_report_shows_every_split_and_marks_the_chosen_one() -> None:
    text = report(on_gpus(), model(V2))
    assert "| **8** | 20 | 51.86 |" in text and "| 4 | 40 | 103.71 |" in text
    assert "| bytes per token | 69,120 | 69,120 |" in text


def test_the_page_says_what_the_code_computes() -> None:
    assert (ROOT / "docs/sizing.md").read_text() == page(), "run: python -m deploy.sizing_page > docs/sizing.md"


def test_sizing_needs_neither_torch_nor_ray() -> None:
    heavy = "{'torch', 'ray', 'vllm', 'grpc', 'transformers'}"
    code = f"import sys, deploy.sizing; assert not {heavy} & sys.modules.keys(), {heavy} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def _embedded() -> Json:
    return json.loads((EMBEDDED / "config.json").read_text())
