"""Random checkpoints: each preset is what its name says, is read by our own reader, and is made twice the same."""

import json
from pathlib import Path

import pytest
import torch

from deploy.checkpoint_presets import PRESETS
from deploy.cli import main
from deploy.make_checkpoint import make_checkpoint
from experts.errors import ConfigError
from experts.shape import MoEShape, RoutingMethod
from experts.weights import load_group, open_checkpoint, read_bias

pytest.importorskip("transformers")

GROUPED, PLAIN, BIASED = RoutingMethod.GROUP_LIMITED_GREEDY, RoutingMethod.GREEDY, RoutingMethod.NOAUX_TC
# num_experts, top_k, num_model_groups, topk_group, method, scoring
EXPECTED = {
    "nano": (32, 6, 8, 3, GROUPED, "softmax"),
    "v2-lite": (32, 6, 1, 1, PLAIN, "softmax"),
    "v3": (32, 6, 8, 3, BIASED, "sigmoid"),
    "qwen3-moe": (32, 4, 1, 1, PLAIN, "softmax"),
    "mixtral": (8, 2, 1, 1, PLAIN, "softmax"),
}


def routing_of_shape(shape: MoEShape) -> tuple[object, ...]:
    return shape.num_experts, shape.top_k, shape.num_model_groups, shape.topk_group, shape.method, shape.scoring


@pytest.mark.parametrize("preset", EXPECTED)
def test_a_preset_opens_with_the_shape_that_its_name_promises(tmp_path: Path, preset: str) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "ckpt", preset=preset))
    assert routing_of_shape(checkpoint.shape) == EXPECTED[preset]
    assert checkpoint.dtype == torch.bfloat16
    layer = checkpoint.shape.moe_layers[-1]
    weights = load_group(checkpoint, range(4), torch.float32)[layer]
    assert weights.w13.std() > 0 and weights.w2.std() > 0
    bias = read_bias(checkpoint, layer)
    assert (bias is not None and bias.std() > 0) if preset == "v3" else bias is None
    assert sum(file.stat().st_size for file in checkpoint.path.glob("*.safetensors")) < 20_000_000


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tmp_path: Path) -> None:
    small = {"preset": "mixtral", "num_hidden_layers": 1, "vocab_size": 300}
    state = torch.get_rng_state()
    first, again = (make_checkpoint(tmp_path / name, **small) for name in ("a", "b"))
    other = make_checkpoint(tmp_path / "c", seed=1, **small)
    assert torch.equal(torch.get_rng_state(), state)
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (first / file).read_bytes() == (again / file).read_bytes()
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_a_small_shard_size_gives_several_files_with_the_same_tensors(tmp_path: Path) -> None:
    small = {"preset": "nano", "num_hidden_layers": 2, "vocab_size": 300}
    whole = open_checkpoint(make_checkpoint(tmp_path / "whole", **small))
    parts = open_checkpoint(make_checkpoint(tmp_path / "parts", max_shard_size="1MB", **small))
    assert len({entry.file for entry in parts.tensors.values()}) > 2
    assert parts.tensors.keys() == whole.tensors.keys() and parts.fingerprint != whole.fingerprint
    one, other = (load_group(c, range(32), torch.float32)[1] for c in (whole, parts))
    assert torch.equal(one.w13, other.w13) and torch.equal(one.w2, other.w2)


def test_the_command_line_makes_a_checkpoint_with_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from transformers import AutoTokenizer

    out = tmp_path / "ckpt"
    assert (
        main(
            ["make-checkpoint", str(out), "--preset", "nano", "--set", "num_hidden_layers=2", "--set", "vocab_size=600"]
        )
        == 0
    )
    assert "tokenizer" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 2
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = "Ünïcode, tabs\tand 1 + 1"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert "assistant:" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )


def test_an_unknown_preset_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nano"):
        make_checkpoint(tmp_path, preset="huge")


def test_a_bad_override_is_an_error_message_and_not_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["make-checkpoint", str(tmp_path / "x"), "--set", "vocab_size=many"]) == 1
    assert main(["make-checkpoint", str(tmp_path / "x"), "--set", "vocab_size=null"]) == 1
    assert capsys.readouterr().err.count("expertmesh make-checkpoint: ") == 2


@pytest.mark.parametrize("preset", PRESETS)
def test_every_latent_preset_has_the_one_layout_that_a_cpu_serves(preset: str) -> None:
    fields = PRESETS[preset].fields
    if "kv_lora_rank" in fields:
        assert (fields["kv_lora_rank"], fields["qk_rope_head_dim"]) == (512, 64)
        rope = fields["rope_parameters"]
        assert isinstance(rope, dict) and rope["rope_type"] == "yarn"
        assert rope["factor"] * rope["original_max_position_embeddings"] == fields["max_position_embeddings"]
