"""Checkpoints: what is read, that nothing else is, and each refusal with the name of what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Self

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from experts.errors import ConfigError
from experts.weights import (
    bytes_needed,
    load_group,
    open_checkpoint,
    pad_intermediate,
    read_bias,
    read_experts,
)

HIDDEN, INNER, EXPERTS, LAYERS = 8, 4, 4, 3
CONFIG = {"num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "num_experts": EXPERTS, "num_experts_per_tok": 2}
NAMES = {"plain": ("mlp", "gate_proj", "up_proj", "down_proj"), "numbered": ("block_sparse_moe", "w1", "w3", "w2")}

Tensors = dict[str, Tensor]
Write = Callable[..., Path]


def some_tensors(spelling: str = "plain", dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """Layer 0 is dense; the value of an expert's matrix says which one it is."""
    home, gate, up, down = NAMES[spelling]
    tensors = {
        "model.embed_tokens.weight": torch.zeros(16, HIDDEN),
        "model.layers.0.mlp.gate_proj.weight": torch.zeros(9),
    }
    for layer in range(1, LAYERS):
        prefix = f"model.layers.{layer}.{home}"
        tensors[f"{prefix}.gate.weight"] = torch.zeros(EXPERTS, HIDDEN)
        tensors[f"{prefix}.shared_experts.gate_proj.weight"] = torch.zeros(INNER, HIDDEN)
        for expert in range(EXPERTS):
            value = 16.0 * layer + 4 * expert
            tensors[f"{prefix}.experts.{expert}.{gate}.weight"] = torch.full((INNER, HIDDEN), value, dtype=dtype)
            tensors[f"{prefix}.experts.{expert}.{up}.weight"] = torch.full((INNER, HIDDEN), value + 1, dtype=dtype)
            tensors[f"{prefix}.experts.{expert}.{down}.weight"] = torch.full((HIDDEN, INNER), value + 2, dtype=dtype)
    return tensors


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a checkpoint folder of one file, or of two with an index."""

    def write_checkpoint(tensors: Tensors | None = None, *, sharded: bool = False, **config: object) -> Path:
        tensors = some_tensors() if tensors is None else tensors
        (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **config}))
        if not sharded:
            save_file(tensors, tmp_path / "model.safetensors")
            return tmp_path
        weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
        for file in set(weight_map.values()):
            save_file({name: t for name, t in tensors.items() if weight_map[name] == file}, tmp_path / file)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return tmp_path

    return write_checkpoint


@pytest.mark.parametrize("spelling", NAMES)
@pytest.mark.parametrize("sharded", [False, True])
def test_the_shape_is_found_from_names_and_headers(write: Write, spelling: str, sharded: bool) -> None:
    shape = open_checkpoint(write(some_tensors(spelling), sharded=sharded)).shape
    assert (shape.moe_layers, shape.hidden_size, shape.moe_intermediate_size) == ((1, 2), HIDDEN, INNER)
    assert (shape.num_experts, shape.top_k) == (EXPERTS, 2)


@pytest.mark.parametrize("spelling", NAMES)
@pytest.mark.parametrize("on_disk", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32])
def test_experts_are_read_in_the_order_asked_for(
    write: Write, spelling: str, on_disk: torch.dtype, wanted: torch.dtype
) -> None:
    checkpoint = open_checkpoint(write(some_tensors(spelling, on_disk), sharded=True))
    weights = read_experts(checkpoint, [3, 1], 2, wanted)
    assert checkpoint.dtype == on_disk
    assert weights.w13.dtype == weights.w2.dtype == wanted
    assert weights.w13.shape == (2, 2 * INNER, HIDDEN) and weights.w2.shape == (2, HIDDEN, INNER)
    for local, expert in enumerate((3, 1)):
        value = 32 + 4 * expert
        assert weights.w13[local, :INNER].eq(value).all()
        assert weights.w13[local, INNER:].eq(value + 1).all()
        assert weights.w2[local].eq(value + 2).all()


def test_a_group_is_every_layer_and_progress_ends_at_the_whole(write: Write) -> None:
    checkpoint = open_checkpoint(write())
    seen: list[tuple[int, int]] = []
    loaded = load_group(checkpoint, range(2, 4), torch.float32, lambda done, total: seen.append((done, total)))
    total = bytes_needed(checkpoint, 2, torch.float32)
    assert sorted(loaded) == [1, 2]
    assert sum(weights.size_bytes for weights in loaded.values()) == total
    assert seen == [(total // 2, total), (total, total)]


def test_only_the_tensors_of_the_asked_experts_are_read(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    import experts.weights as module

    read: list[str] = []
    real_open = module.safe_open

    class Recorder:
        def __init__(self, *args: object, **kwargs: object) -> None:
            self.file = real_open(*args, **kwargs)

        def __enter__(self) -> Self:
            self.file.__enter__()
            return self

        def __exit__(self, *args: object) -> None:
            self.file.__exit__(*args)

        def get_tensor(self, name: str) -> Tensor:
            read.append(name)
            return self.file.get_tensor(name)

    checkpoint = open_checkpoint(write(sharded=True))
    monkeypatch.setattr(module, "safe_open", Recorder)
    load_group(checkpoint, [2], torch.float32)
    assert len(read) == 6 and all(".experts.2." in name for name in read)


def test_the_selection_bias_is_float32_and_absent_is_none(write: Write) -> None:
    assert read_bias(open_checkpoint(write()), 1) is None
    tensors = some_tensors()
    for layer in (1, 2):
        tensors[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] = torch.arange(4).to(torch.bfloat16)
    bias = read_bias(open_checkpoint(write(tensors, topk_method="noaux_tc", scoring_func="sigmoid")), 1)
    assert bias is not None and bias.dtype == torch.float32 and bias.tolist() == [0, 1, 2, 3]


def test_layers_behind_the_last_one_are_prediction_heads_and_are_left_out(write: Write) -> None:
    checkpoint = open_checkpoint(write(num_hidden_layers=2))
    assert checkpoint.shape.moe_layers == (1,)


def test_the_fingerprint_is_stable_and_sees_every_header_and_the_config(write: Write) -> None:
    first = open_checkpoint(write(sharded=True)).fingerprint
    assert open_checkpoint(write(sharded=True)).fingerprint == first
    assert open_checkpoint(write(sharded=True, rope_theta=2.0)).fingerprint != first
    tensors = some_tensors()
    tensors["model.embed_tokens.weight"] = torch.zeros(17, HIDDEN)
    assert open_checkpoint(write(tensors, sharded=True)).fingerprint != first


def test_padding_the_inner_width_adds_zeros_between_gate_and_up(write: Write) -> None:
    weights = read_experts(open_checkpoint(write()), range(EXPERTS), 1, torch.float32)
    padded = pad_intermediate(weights, 32)
    assert padded.w13.shape == (EXPERTS, 64, HIDDEN) and padded.w2.shape == (EXPERTS, HIDDEN, 32)
    assert torch.equal(padded.w13[:, :INNER], weights.w13[:, :INNER])
    assert torch.equal(padded.w13[:, 32 : 32 + INNER], weights.w13[:, INNER:])
    assert torch.equal(padded.w2[:, :, :INNER], weights.w2)
    assert padded.w13.sum() == weights.w13.sum() and padded.w2.sum() == weights.w2.sum()


# Refusals. Each message must name what is wrong.


def test_no_such_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no checkpoint folder .*nowhere"):
        open_checkpoint(tmp_path / "nowhere")


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth"])
def test_pickled_weights_are_refused(write: Write, suffix: str) -> None:
    folder = write()
    (folder / "model.safetensors").rename(folder / f"pytorch_model.{suffix}")
    with pytest.raises(ConfigError, match=rf"pytorch_model\.{suffix}.*convert the checkpoint to safetensors"):
        open_checkpoint(folder)


def test_a_folder_without_weights_is_refused(write: Write) -> None:
    folder = write()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor"):
        open_checkpoint(folder)


def test_code_in_the_checkpoint_is_refused(write: Write) -> None:
    with pytest.raises(ConfigError, match="auto_map"):
        open_checkpoint(write(auto_map={"AutoModel": "modeling.Model"}))


@pytest.mark.parametrize("matrix", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("expert", [0, 2, 3])
def test_a_missing_tensor_is_named(write: Write, matrix: str, expert: int) -> None:
    tensors = some_tensors()
    name = f"model.layers.2.mlp.experts.{expert}.{matrix}.weight"
    del tensors[name]
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        open_checkpoint(write(tensors))


def test_a_layer_with_a_router_and_no_experts_is_refused(write: Write) -> None:
    tensors = {name: t for name, t in some_tensors().items() if "layers.2.mlp.experts" not in name}
    with pytest.raises(ConfigError, match="of layer 2 is missing"):
        open_checkpoint(write(tensors))


@pytest.mark.parametrize("matrix", ["gate_proj", "up_proj", "down_proj"])
def test_a_misshapen_tensor_is_named_with_both_shapes(write: Write, matrix: str) -> None:
    tensors = some_tensors()
    name = f"model.layers.1.mlp.experts.0.{matrix}.weight"
    right = list(tensors[name].shape)
    tensors[name] = torch.zeros(5, 5)
    with pytest.raises(ConfigError) as caught:
        open_checkpoint(write(tensors))
    assert all(part in str(caught.value) for part in (name, "[5, 5]", str(right)))


@pytest.mark.parametrize("name", ["experts.gate_up_proj", "experts.down_proj.weight"])
def test_experts_fused_into_one_tensor_are_refused(write: Write, name: str) -> None:
    tensors = {"model.layers.1.mlp." + name: torch.zeros(EXPERTS, 2 * INNER, HIDDEN)}
    with pytest.raises(ConfigError, match=rf"mlp\.{name}.*one tensor per expert"):
        open_checkpoint(write(tensors))


def test_eight_bit_floats_are_refused_by_name(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"experts\.0\.down_proj\.weight is stored as F8_E4M3"):
        open_checkpoint(write(some_tensors(dtype=torch.float8_e4m3fn)))


def test_config_and_tensors_must_agree(write: Write) -> None:
    with pytest.raises(ConfigError, match="hidden_size is 16, but expert tensors have 8"):
        open_checkpoint(write(hidden_size=16))
    with pytest.raises(ConfigError, match="says 3 routed experts, but there are tensors of expert 3"):
        open_checkpoint(write(num_experts=3))
    with pytest.raises(ConfigError, match=r"expert 4 of layer 1 is missing"):
        open_checkpoint(write(num_experts=5))


def test_a_checkpoint_without_experts_is_refused(write: Write) -> None:
    with pytest.raises(ConfigError, match="has no experts"):
        open_checkpoint(write({"model.embed_tokens.weight": torch.zeros(2, 2)}))


def test_a_bias_that_the_method_needs_is_demanded(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.gate\.e_score_correction_bias is missing"):
        open_checkpoint(write(topk_method="noaux_tc", scoring_func="sigmoid"))


def test_a_missing_shard_is_named(write: Write) -> None:
    folder = write(sharded=True)
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"part-1\.safetensors, which is missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/hosts", "a/../../b", "..\\x", 7, "", None])
def test_an_index_that_leaves_the_folder_is_refused(write: Write, file: object) -> None:
    folder = write()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": file}}))
    with pytest.raises(ConfigError, match="leaves the checkpoint folder|must be a file name"):
        open_checkpoint(folder)


def test_an_index_that_names_the_wrong_shard_is_refused(write: Write) -> None:
    folder = write(sharded=True)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    weight_map["model.embed_tokens.weight"] = "part-1.safetensors"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ConfigError, match=r"embed_tokens\.weight is in part-1"):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", ["{", "[]", '"x"'])
def test_a_config_that_is_no_json_object_is_refused(write: Write, content: str) -> None:
    folder = write()
    (folder / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        open_checkpoint(folder)


def test_a_file_that_vanishes_after_the_check_is_a_config_error(write: Write) -> None:
    checkpoint = open_checkpoint(write())
    (checkpoint.path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="changed since the start"):
        read_experts(checkpoint, [0], 1, torch.float32)
