"""The report says what the result files say: arithmetic, verdicts, figures, and the card beside the weights."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import save_file

from router.balance import BalanceWeights
from training.arithmetic import DEEPSEEK_V2, Attention, Results, Run, below, change, paper_saving
from training.card import write_card
from training.evaluate import Evaluation
from training.loop import TrainConfig
from training.measure import CAPACITY_FACTORS, DEVICES
from training.model import NANO
from training.report import markdown, write_report

ROOT = Path(__file__).parents[2]
NUM_LAYERS, NUM_EXPERTS, NUM_DEVICES = 5, 32, 8
NUM_TOKENS, NUM_BYTES = 1000, 4000


def an_evaluation(
    bits_per_byte: float, *, uneven: float = 0.0, fan_out: float = 2.5, dropped: float = 0.0
) -> Evaluation:
    """The first expert of each device has 1 + uneven times the load of the others."""
    load = np.ones((NUM_LAYERS, NUM_EXPERTS))
    load[:, :: NUM_EXPERTS // NUM_DEVICES] += uneven
    return Evaluation(
        num_tokens=NUM_TOKENS,
        nats=bits_per_byte * float(np.log(2)) * NUM_BYTES,
        num_bytes=NUM_BYTES,
        load=load.tolist(),
        rows=np.full((NUM_LAYERS, NUM_DEVICES), fan_out * NUM_TOKENS / NUM_DEVICES).tolist(),
        dropped=dropped,
    )


NO_LOSSES = BalanceWeights(expert=0.0, device=0.0, communication=0.0)
RUNS = {"balanced": TrainConfig(steps=1800), "unbalanced": TrainConfig(steps=1800, stop_at=600, alphas=NO_LOSSES)}


def a_log(config: TrainConfig) -> list[dict[str, float]]:
    """Half of the pairs are dropped in the first tenth of the steps, a quarter after; a second a step."""
    noise = np.random.default_rng(0).normal(0, 0.2, config.last_step)
    return [
        {
            "step": step,
            "loss": 4 + 4 / (1 + step / 50) + noise[step],
            "expert": 1.5 + noise[step],
            "device": 1.25,
            "communication": 1.1,
            "dropped": 0.5 if step < config.last_step // 10 else 0.25,
            "tokens_per_s": float(config.tokens_per_step),
        }
        for step in range(config.last_step)
    ]


def held_out(served: Evaluation) -> dict[str, Evaluation]:
    evaluations = {
        "served": served,
        "part": served,
        "balanced": an_evaluation(2.2),
        "unbalanced": an_evaluation(2.1, uneven=9.0),
    }
    evaluations |= {f"capacity {factor}": an_evaluation(2.0, dropped=0.125) for factor in CAPACITY_FACTORS}
    return evaluations | {f"devices {devices}": an_evaluation(2.0, fan_out=devices * 0.5) for devices in DEVICES}


def write_results(work: Path, results: Mapping[str, object]) -> None:
    (work / "results").mkdir()
    for name, result in results.items():
        (work / "results" / f"{name}.json").write_text(json.dumps(result))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Two runs and their results, all made up."""
    work = tmp_path / "work"
    for name, config in RUNS.items():
        folder = work / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(asdict(config)))
        (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in a_log(config)))
    rows = [("macbeth", "shakespeare", True), ("hamlet", "shakespeare", False), ("emma", "austen", False)]
    rows += [("1790-Washington-1", "sotu", False)]
    fields = ("name", "source", "held_out")
    text = [dict(zip(fields, row)) | {"bytes": 4_000_000, "tokens": 1_228_800} for row in rows]
    (work / "text.json").write_text(json.dumps(text))
    evaluations = {name: asdict(evaluation) for name, evaluation in held_out(an_evaluation(1.75)).items()}
    reading = {"bytes_per_token": 6912.0, "dtype": "bfloat16", "num_blocks": 10, "block_size": 16}
    write_results(
        work,
        {
            "held_out": evaluations,
            "baselines": {"xz": 2.25, "5-gram": 1.5},
            "kv_cache": reading,
            "samples": [{"prompt": "MACBETH.\n", "text": "Is this a ``` which I see?"}],
        },
    )
    return work


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(NANO)))
    save_file({"a": torch.zeros(3, 5, dtype=torch.bfloat16)}, folder / "model.safetensors")
    return folder


def row_of(text: str, label: str) -> list[str]:
    """The cells of the one table row that starts with a label."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in line.strip("|").split(" | ")][1:]


def sentence_with(text: str, words: str) -> str:
    (line,) = [line for line in text.splitlines() if words in line]
    return line


def test_the_latent_cache_is_counted_beside_both_kinds_of_multi_head_attention() -> None:
    nano = Attention(
        num_layers=6, num_heads=4, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=64, v_head_dim=64
    )
    assert (nano.latent, nano.multi_head, nano.multi_head_as_wide) == (576 * 6, 2 * 4 * 64 * 6, 4 * 192 * 6)
    assert nano.pays_from_heads == 5
    assert replace(nano, num_heads=5).multi_head > nano.latent > replace(nano, num_heads=4).multi_head
    assert DEEPSEEK_V2.latent == 34_560
    assert DEEPSEEK_V2.multi_head == 1_966_080


def test_the_papers_saving_comes_out_as_the_paper_says() -> None:
    saving = paper_saving()
    assert round(saving.quantized, 3) == 0.933
    assert round(saving.equal_precision, 3) == 0.822


def test_a_verdict_is_about_the_number_and_not_about_its_print() -> None:
    assert (below(1.9999, 2.0), below(2.0, 2.0), below(2.5, 2.0)) == ("below", "not below", "not below")
    assert (change(1.1, 1.0), change(0.5, 1.0)) == ("10.0 % more", "50.0 % less")
    assert change(1.0001, 1.0) == "the same within 0.05 %"


def test_a_run_is_read_back_with_its_configuration_and_its_time(work: Path) -> None:
    run = Run.read(work / "runs" / "unbalanced")
    assert run.config == RUNS["unbalanced"]
    assert (run.num_steps, run.num_tokens) == (600, 600 * 2048)
    assert run.hours == pytest.approx(600 / 3600)
    assert run.means("dropped") == pytest.approx((0.5, 0.25, 0.275))


def test_the_report_has_the_measured_numbers(work: Path, checkpoint: Path) -> None:
    text = markdown(Results.read(work, checkpoint))
    assert row_of(text, "parameters") == ["15"]
    assert row_of(text, "steps") == ["1,800", "600"]
    assert row_of(text, "alpha of the device level") == ["0.05", "0.0"]
    assert row_of(text, "shakespeare, held out") == ["1", "4,000,000", "1,228,800"]
    assert "read 1.00 times as many tokens" in text
    perplexity = f"{2 ** (1.75 * NUM_BYTES / NUM_TOKENS):.2f}"
    assert row_of(text, "none") == [perplexity, "1.750", "0.0 %"]
    assert row_of(text, "1.25") == ["256.00", "2.000", "12.5 %"]
    assert row_of(text, "1") == ["4", "0.50", "256.00", "2.000"]
    assert row_of(text, "3, as trained") == ["6", "2.50", perplexity, "1.750"]
    assert row_of(text, "nano") == ["6,912", "6,144 (112.5 %)", "9,216 (75.0 %)"]
    assert row_of(text, "with balance losses, the first 600 steps") == ["50.0 %", "25.0 %", "32.5 %"]
    assert "Where 1 may be visited, a token has only the 4 experts there instead of 6." in text
    assert "````text\nIs this a ``` which I see?\n````" in text


def test_the_report_says_of_every_mark_on_which_side_of_it_the_model_is(work: Path, checkpoint: Path) -> None:
    text = markdown(Results.read(work, checkpoint))
    assert "1.750 bits per byte are below 2.0, below those of `xz -9e`, and not below those of the 5-gram" in (
        text.replace("\n", " ")
    )
    verdict = sentence_with(text, "Its least even layer")
    assert "not below 0.85 at device level" in verdict and "not below 0.5 at expert level" in verdict
    # 8 of 32 experts have ten times the load of the others: a mean of 3.25 over a maximum of 10; each device has one.
    without = sentence_with(text, "- Without balance losses after")
    assert "expert level 0.325 on average, 0.325 in the least even layer" in without
    assert "device level 1.000 on average" in without
    cache = sentence_with(text, "the latent cache is")
    assert "not below the first count (12.5 % more) and below the second (25.0 % less)" in cache


def test_a_model_that_misses_its_marks_is_reported_so(work: Path, checkpoint: Path) -> None:
    served = an_evaluation(2.5, uneven=0.5)
    results = Results.read(work, checkpoint)
    text = markdown(replace(results, held_out=held_out(served)))
    assert "2.500 bits per byte are not below 2.0, not below those of `xz -9e`" in text.replace("\n", " ")
    assert "expert level 0.750 on average" in sentence_with(text, "- The checkpoint:")


def test_a_sentence_ends_with_its_line(work: Path, checkpoint: Path) -> None:
    text = markdown(Results.read(work, checkpoint)).partition("## How it writes")[0]
    prose = [line for line in text.splitlines() if line and line[0].isupper()]
    assert len(prose) > 30
    assert [line for line in prose if not line.endswith((".", ":"))] == []
    assert [line for line in prose if ". " in line] == []


def test_the_report_and_its_figures_are_written_twice_the_same(work: Path, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = []
    for name in ("first", "second"):
        docs = tmp_path / name
        write_report(work, checkpoint, docs)
        written.append({file.relative_to(docs): file.read_bytes() for file in docs.rglob("*.*")})
    assert written[0] == written[1]
    assert {str(file) for file in written[0]} == {"nano.md", "nano/loss.png", "nano/factors.png", "nano/load.png"}
    for file, data in written[0].items():
        assert len(data) < 150_000, f"{file} has {len(data)} bytes"
    text = written[0][Path("nano.md")].decode()
    assert all(f"({file})" in text for file in written[0] if file.suffix == ".png")


def test_a_report_before_its_measurements_is_refused(work: Path, checkpoint: Path, tmp_path: Path) -> None:
    (work / "results" / "kv_cache.json").unlink()
    with pytest.raises(FileNotFoundError, match="lacks kv_cache"):
        write_card(work, checkpoint)


def test_the_card_lies_beside_the_weights_with_the_projects_licence(work: Path, checkpoint: Path) -> None:
    write_card(work, checkpoint)
    card = (checkpoint / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "It is not for answers." in card
    assert "- 1.750 bits per byte of held-out text" in card
    assert "(alphas: 0.003 for experts, 0.05 for devices, 0.02 for communication)" in card.replace("\n", " ")
    assert (checkpoint / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
