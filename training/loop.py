"""The training loop: batches that depend on the step alone, and checkpoints from which a killed run goes on."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import DeepseekV2ForCausalLM

from router.balance import BalanceFactors, BalanceWeights
from training.model import NANO, Routed, build
from training.state import load_state, save_snapshot, save_state

BETAS = (0.9, 0.95)  # of AdamW, as in the paper (DeepSeek-V2, 3.1.2)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One run; two runs differ by `alphas` alone where their balance is to be compared."""

    steps: int  # of the learning rate's schedule
    stop_at: int | None = None  # a run that only compares may stop earlier
    batch_size: int = 4  # sequences
    length: int = 512  # tokens of a sequence
    peak_lr: float = 1.5e-3
    warmup_steps: int = 100
    decay_share: float = 0.4  # of the steps, at the end, in which the learning rate falls to zero
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    alphas: BalanceWeights = field(default_factory=BalanceWeights)
    capacity_factor: float | None = 1.0  # token dropping, DeepSeek-V2, 2.2.4
    exempt_share: float = 0.1  # sequences whose tokens are never dropped
    seed: int = 0
    checkpoint_every: int = 100
    snapshot_at: int | None = None  # after so many steps the weights are kept for a comparison, too

    @property
    def last_step(self) -> int:
        return self.steps if self.stop_at is None else min(self.stop_at, self.steps)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.length


def train(
    config: TrainConfig,
    tokens: NDArray[np.uint16],
    folder: Path,
    *,
    device: str,
    fields: Mapping[str, object] = NANO,
) -> DeepseekV2ForCausalLM:
    """Runs what is missing of a run that is kept in `folder`; the trained model, in float32.

    tokens: [num_tokens] the training text, documents one after the other.
    fields: the model's config.json.
    Writes `state.pt` (the newest checkpoint), `log.jsonl` (a line a step), `config.json` and the snapshot that the
    configuration asks for into the folder.
    Raises ValueError where the folder holds a run of another configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _keep_config(config, folder)
    model, routed = build(fields, seed=config.seed)
    nn.Module.to(model, device).train()
    optimizer = _optimizer(model, config)
    done = load_state(folder, model, optimizer)
    _cut_log(folder / "log.jsonl", done)
    progress = tqdm(
        total=config.last_step * config.tokens_per_step,
        initial=done * config.tokens_per_step,
        unit="tok",
        unit_scale=True,
        desc=folder.name,
        mininterval=2.0,
        smoothing=0.05,
    )
    with progress, (folder / "log.jsonl").open("a") as log:
        for step in range(done, config.last_step):
            batch = torch.from_numpy(batch_of(step, tokens, config)).to(device)
            record = _step(model, routed, optimizer, batch, config, step)
            log.write(json.dumps(record) + "\n")
            progress.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
            progress.update(config.tokens_per_step)
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.last_step:
                log.flush()
                save_state(folder, model, optimizer, steps=step + 1)
            if step + 1 == config.snapshot_at:
                save_snapshot(folder, model, steps=step + 1)
    return model.eval()


def _step(
    model: DeepseekV2ForCausalLM,
    routed: Routed,
    optimizer: torch.optim.Optimizer,
    batch: Tensor,
    config: TrainConfig,
    step: int,
) -> dict[str, float]:
    """One step on batch [batch_size, length + 1]; what the log keeps of it."""
    start_s = time.monotonic()
    routed.clear()
    routed.capacity_factor = config.capacity_factor
    routed.exempt = exempt_tokens(step, config).to(batch.device)
    with mixed_precision(batch.device.type):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    loss = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
    balance = torch.stack([config.alphas.loss(factors) for factors in routed.factors]).sum()
    (loss + balance).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    record = {"step": step, "loss": loss.item(), "grad_norm": float(norm), "lr": learning_rate(step, config)}
    record |= {name: _mean(routed.factors, name) for name in BalanceFactors._fields}
    record["dropped"] = torch.stack(routed.dropped).mean().item() if routed.dropped else 0.0
    record["tokens_per_s"] = config.tokens_per_step / (time.monotonic() - start_s)
    if not math.isfinite(record["loss"]):
        raise FloatingPointError(f"the loss is {record['loss']} at {step=}; lower peak_lr ({config.peak_lr})")
    return record


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then constant, then linear to zero over the last `decay_share` of the steps."""
    decay_steps = max(config.decay_share * config.steps, 1)
    return config.peak_lr * min((step + 1) / config.warmup_steps, 1.0, (config.steps - step) / decay_steps)


def batch_of(step: int, tokens: NDArray[np.uint16], config: TrainConfig) -> NDArray[np.int64]:
    """[batch_size, length + 1]: the windows of one step; every window of the text once an epoch, in a new order."""
    windows = (len(tokens) - 1 - config.length) // config.length  # one less than fits, to leave room for a shift
    if windows < config.batch_size:
        raise ValueError(f"{len(tokens)=} are fewer than a batch of {config.batch_size} x {config.length} needs")
    batches = windows // config.batch_size
    epoch, place = divmod(step, batches)
    order = np.random.default_rng((config.seed, epoch))
    shift = int(order.integers(config.length))
    chosen = order.permutation(windows)[place * config.batch_size : (place + 1) * config.batch_size]
    starts = chosen * config.length + shift
    return np.stack([tokens[start : start + config.length + 1] for start in starts]).astype(np.int64)


def exempt_tokens(step: int, config: TrainConfig) -> Tensor:
    """[batch_size * length] bool: the tokens of about `exempt_share` of the sequences."""
    draws = np.random.default_rng((config.seed, 1, step)).random(config.batch_size)
    return torch.from_numpy(draws < config.exempt_share).repeat_interleave(config.length)


def mixed_precision(device_type: str) -> AbstractContextManager[object]:
    """bfloat16 where matrix products are faster in it: on a GPU, and on a CPU that has instructions for it."""
    helps = device_type == "cuda" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device_type, dtype=torch.bfloat16) if helps else nullcontext()


def read_log(folder: Path) -> Iterator[dict[str, float]]:
    """The records of a run, a step each."""
    with (folder / "log.jsonl").open() as lines:
        yield from map(json.loads, lines)


def _mean(factors: list[BalanceFactors], name: str) -> float:
    return sum(getattr(layer, name).item() for layer in factors) / len(factors)


def _optimizer(model: DeepseekV2ForCausalLM, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; norms are not decayed."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.peak_lr, betas=BETAS, fused=True)


def _keep_config(config: TrainConfig, folder: Path) -> None:
    """Writes the run's configuration, or refuses to go on with a run of another one; only `stop_at` may change."""
    file, fields = folder / "config.json", asdict(config)
    if file.exists():
        before = json.loads(file.read_text())
        changed = {name for name in fields if fields[name] != before.get(name)} - {"stop_at", "checkpoint_every"}
        if changed:
            raise ValueError(f"{folder} holds a run with another {', '.join(sorted(changed))}; move it away first")
    file.write_text(json.dumps(fields, indent=2))


def _cut_log(file: Path, steps: int) -> None:
    """Drops the records after the newest checkpoint: those steps are run again."""
    lines = file.read_text().splitlines(keepends=True)[:steps] if file.exists() else []
    file.write_text("".join(lines))
