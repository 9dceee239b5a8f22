"""What the report and the card tell: the result files, read once, and the arithmetic on them."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self, TypedDict

import numpy as np
from numpy.typing import NDArray

from router.balance import BalanceWeights
from training.evaluate import Evaluation
from training.export import num_parameters
from training.loop import TrainConfig, read_log
from training.text import Source

# What the checkpoint was meant to reach; the report says of each whether it does.
DEVICE_MARK = 0.85  # balancedness of devices, in every routed layer at least
EXPERT_MARK = 0.5  # balancedness of experts, on average over the routed layers at least
BITS_MARK = 2.0  # bits per byte of the held-out text, less

BFLOAT16_BYTES = 2

# What the two runs and the three factors are called wherever they are told about.
WITH, WITHOUT = "with balance losses", "without balance losses"
FACTORS = {"expert": "expert level", "device": "device level", "communication": "communication"}


class TextRow(TypedDict):
    """A document as training/prepare.py describes it."""

    name: str
    source: Source
    held_out: bool
    bytes: int
    tokens: int


class CacheReading(TypedDict):
    """What training/kv_cache.py found in a running engine."""

    bytes_per_token: float
    dtype: str
    num_blocks: int
    block_size: int


class Sample(TypedDict):
    prompt: str
    text: str


class Means(NamedTuple):
    """Means of a series over its first tenth, its last tenth, and all of it."""

    first: float
    last: float
    whole: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A training run: its configuration, and its log by column."""

    config: TrainConfig
    log: Mapping[str, NDArray[np.float64]]  # each [num_steps]

    @property
    def num_steps(self) -> int:
        return len(self.log["loss"])

    @property
    def num_tokens(self) -> int:
        """Tokens that the run has read."""
        return self.num_steps * self.config.tokens_per_step

    @property
    def hours(self) -> float:
        """What its steps took; checkpoints and waiting between them do not count."""
        return float((self.config.tokens_per_step / self.log["tokens_per_s"]).sum()) / 3600

    def means(self, column: str, *, num_steps: int | None = None) -> Means:
        """Of a column of the log, or of its first `num_steps`."""
        values = self.log[column][:num_steps]
        tenth = max(len(values) // 10, 1)
        return Means(float(values[:tenth].mean()), float(values[-tenth:].mean()), float(values.mean()))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises OSError where the folder holds no run."""
        fields = json.loads((folder / "config.json").read_text())
        records = list(read_log(folder))
        return cls(
            config=TrainConfig(**fields | {"alphas": BalanceWeights(**fields["alphas"])}),
            log={name: np.array([record[name] for record in records]) for name in records[0]},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """The shape of a model's attention, as far as its cache goes; what it keeps is counted in numbers per token."""

    num_layers: int
    num_heads: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int  # the paper's d_h

    @property
    def latent(self) -> int:
        """Latent attention: one compressed vector and one key with the position, whatever the number of heads."""
        return (self.kv_lora_rank + self.qk_rope_head_dim) * self.num_layers

    @property
    def multi_head(self) -> int:
        """Multi-head attention as the paper counts it (DeepSeek-V2, table 1): 2 x n_h x d_h a layer."""
        return 2 * self.num_heads * self.v_head_dim * self.num_layers

    @property
    def multi_head_as_wide(self) -> int:
        """Multi-head attention with keys and values as wide as this model's own."""
        return self.num_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim) * self.num_layers

    @property
    def pays_from_heads(self) -> int:
        """The number of heads from which on the latent is smaller than multi-head attention as the paper counts it."""
        return (self.kv_lora_rank + self.qk_rope_head_dim) // (2 * self.v_head_dim) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedAttention:
    """Attention whose heads share keys and values."""

    num_layers: int
    num_kv_heads: int
    head_dim: int

    @property
    def kept(self) -> int:
        """Numbers per token."""
        return 2 * self.num_kv_heads * self.head_dim * self.num_layers


DEEPSEEK_V2 = Attention(
    num_layers=60, num_heads=128, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128
)
DEEPSEEK_67B = GroupedAttention(num_layers=95, num_kv_heads=8, head_dim=128)
PAPER_BITS = 6  # of a number in DeepSeek-V2's cache as it is deployed (3.2.3), on average


class PaperSaving(NamedTuple):
    """How much smaller DeepSeek-V2's cache is than DeepSeek 67B's, as shares of the latter."""

    equal_precision: float
    quantized: float  # the latent in PAPER_BITS, DeepSeek 67B's in bfloat16


def paper_saving() -> PaperSaving:
    share = DEEPSEEK_V2.latent / DEEPSEEK_67B.kept
    return PaperSaving(1 - share, 1 - share * PAPER_BITS / (8 * BFLOAT16_BYTES))


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Everything that was measured."""

    config: Mapping[str, int]  # the whole numbers of the checkpoint's config.json
    num_parameters: int
    size_bytes: int  # of the weights
    text: Sequence[TextRow]
    balanced: Run
    unbalanced: Run
    held_out: Mapping[str, Evaluation]  # by name, as in training/measure.py
    baselines: Mapping[str, float]  # bits per byte
    kv_cache: CacheReading
    samples: Sequence[Sample]

    @property
    def served(self) -> Evaluation:
        return self.held_out["served"]

    @property
    def layers(self) -> range:
        """The routed layers."""
        return range(self.config["first_k_dense_replace"], self.config["num_hidden_layers"])

    @property
    def attention(self) -> Attention:
        names = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        return Attention(
            num_layers=self.config["num_hidden_layers"],
            num_heads=self.config["num_attention_heads"],
            **{name: self.config[name] for name in names},
        )

    def experts_of_a_token(self, devices: int) -> int:
        """How many experts a token gets where it may visit so many devices."""
        per_device = self.config["n_routed_experts"] // self.config["n_group"]
        return min(self.config["num_experts_per_tok"], devices * per_device)

    def balancedness(self, name: str) -> dict[str, list[float]]:
        """Of one evaluation: {"expert": [layer], "device": [layer]}."""
        evaluation = self.held_out[name]
        return {
            "expert": evaluation.expert_balancedness,
            "device": evaluation.device_balancedness(self.config["n_group"]),
        }

    def relative_load(self, name: str) -> NDArray[np.float64]:
        """[num_layers, num_experts] of one evaluation: tokens that select an expert, over their mean in its layer."""
        load = np.array(self.held_out[name].load)
        return load / load.mean(axis=1, keepdims=True)

    @classmethod
    def read(cls, work: Path, checkpoint: Path) -> Self:
        """Raises OSError where something has not been measured yet."""
        read = {file.stem: json.loads(file.read_text()) for file in (work / "results").glob("*.json")}
        if absent := {"held_out", "baselines", "kv_cache", "samples"} - read.keys():
            raise FileNotFoundError(f"{work / 'results'} lacks {', '.join(sorted(absent))}; measure first")
        config = json.loads((checkpoint / "config.json").read_text())
        return cls(
            config={name: value for name, value in config.items() if isinstance(value, int)},
            num_parameters=num_parameters(checkpoint),
            size_bytes=(checkpoint / "model.safetensors").stat().st_size,
            text=json.loads((work / "text.json").read_text()),
            balanced=Run.read(work / "runs" / "balanced"),
            unbalanced=Run.read(work / "runs" / "unbalanced"),
            held_out={name: Evaluation(**fields) for name, fields in read["held_out"].items()},
            baselines=read["baselines"],
            kv_cache=read["kv_cache"],
            samples=read["samples"],
        )


def below(value: float, mark: float) -> str:
    """The verdict in words, of the numbers as they are and not as they are printed."""
    return "below" if value < mark else "not below"


def change(value: float, before: float) -> str:
    """By how much a value differs from another, such as "3.1 % more"."""
    share = value / before - 1
    if math.isclose(share, 0.0, abs_tol=5e-4):
        return "the same within 0.05 %"
    return f"{percent(abs(share))} {'more' if share > 0 else 'less'}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [head, ("---", *("---:" for _ in head[1:])), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def cache_table(models: Mapping[str, Attention]) -> str:
    """Bytes a token of each model by name, in bfloat16, and in brackets the latent's share of the others."""
    rows = []
    for name, model in models.items():
        others = [
            f"{other * BFLOAT16_BYTES:,} ({percent(model.latent / other)})"
            for other in (model.multi_head, model.multi_head_as_wide)
        ]
        rows.append((name, f"{model.latent * BFLOAT16_BYTES:,}", *others))
    return table(("", "latent", "multi-head, 2 x n_h x d_h", "multi-head, as wide as the model's own"), rows)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def fenced(text: str) -> str:
    """A code block whose fence is longer than any in the text."""
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", text))])
    return f"{fence}text\n{text}\n{fence}"
