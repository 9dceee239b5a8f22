"""Held-out text is read once, whatever the windows, and what is counted is what the layers did."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training_loop import TEXT, TINY
from torch.nn import functional

from training import evaluate, export
from training.evaluate import Evaluation, HeldOut
from training.export import load_exported, num_parameters
from training.model import NANO, build
from training.state import save_state

DOCUMENTS = [np.concatenate([[1], part, [2]]).astype(np.uint16) for part in (TEXT[:50], TEXT[50:63], TEXT[63:64])]
TOKEN_BYTES = np.array([0, 0, 0] + [2] * 61)


@pytest.fixture(autouse=True)
def _short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "LENGTH", 20)


@pytest.fixture
def held_out() -> HeldOut:
    return HeldOut.of(DOCUMENTS, TOKEN_BYTES)


def test_windows_predict_every_token_but_the_first_of_a_document_once(held_out: HeldOut) -> None:
    predicted = [token for window in held_out.windows for token in window[1:]]
    assert predicted == [token for document in DOCUMENTS for token in document[1:]]
    assert held_out.num_bytes == 2 * 64


def test_a_part_has_the_bytes_of_its_own_windows() -> None:
    parts = [HeldOut.of(DOCUMENTS[skip:], TOKEN_BYTES, every=2) for skip in (0, 1)]
    assert [len(part.windows) for part in parts] == [3, 1]  # of 5 and of 2
    assert parts[1].num_bytes == 2 * 13


def test_the_likelihood_is_that_of_one_window_at_a_time(held_out: HeldOut) -> None:
    model, routed = build(TINY, seed=1)
    found = Evaluation.of(model, routed, held_out, name="test")
    nats = 0.0
    for window in held_out.windows:
        tokens = torch.from_numpy(window.astype(np.int64))
        with torch.no_grad():
            logits = model(input_ids=tokens[None, :-1], use_cache=False).logits[0]
        nats += functional.cross_entropy(logits, tokens[1:], reduction="sum").item()
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.num_tokens == sum(len(document) - 1 for document in DOCUMENTS)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / 128, rel=1e-5)


def test_padding_counts_for_no_expert(held_out: HeldOut) -> None:
    model, routed = build(TINY, seed=1)
    found = Evaluation.of(model, routed, held_out, name="test")
    assert [sum(layer) for layer in found.load] == [found.num_tokens * 6]
    assert 1 <= found.fan_out <= 3
    assert found.dropped == 0
    assert len(found.device_balancedness(8)) == len(found.expert_balancedness) == 1


def test_more_devices_a_token_mean_a_larger_fan_out_and_a_small_capacity_drops(held_out: HeldOut) -> None:
    model, routed = build(TINY, seed=1)
    fan_out = []
    for devices in (1, 2, 3, 8):
        routed.max_groups = devices
        fan_out.append(Evaluation.of(model, routed, held_out, name="test").fan_out)
    assert fan_out[0] == 1 and fan_out == sorted(fan_out)
    routed.capacity_factor = 0.5
    assert Evaluation.of(model, routed, held_out, name="test").dropped > 0.2


def test_an_exported_run_is_a_bfloat16_checkpoint_with_an_expert_a_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "NANO", TINY)
    model, _ = build(TINY, seed=1)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tokenizer / name).write_text("{}")
    with pytest.raises(ValueError, match="no checkpoint to export"):
        export.export(tmp_path / "run", tokenizer, tmp_path / "out")
    (tmp_path / "run").mkdir()
    save_state(tmp_path / "run", model, torch.optim.AdamW(model.parameters()), steps=5)
    export.export(tmp_path / "run", tokenizer, tmp_path / "out")

    from safetensors import safe_open

    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert "model.layers.1.mlp.experts.31.up_proj.weight" in file.keys()  # noqa: SIM118
        assert {str(file.get_slice(name).get_dtype()) for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert num_parameters(tmp_path / "out") == sum(p.numel() for p in model.parameters())
    served, _ = load_exported(tmp_path / "out")
    for ours, theirs in zip(served.parameters(), model.parameters()):
        assert torch.equal(ours, theirs.to(torch.bfloat16).float())


def test_the_nano_is_within_what_was_promised() -> None:
    with torch.device("meta"):
        model, _ = build(NANO, seed=0)
    assert 15e6 < sum(p.numel() for p in model.parameters()) < 30e6
