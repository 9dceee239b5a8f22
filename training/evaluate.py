"""What a trained model is worth on text that it has not read, and how evenly that text falls on its experts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import DeepseekV2ForCausalLM

from router.balance import balancedness, expert_load, group_rows
from training.loop import mixed_precision
from training.model import Routed

LENGTH = 512  # tokens of context, as in training
BATCH_SIZE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Figures over some text; `load` and `rows` have an entry per routed layer."""

    num_tokens: int  # predicted
    nats: float  # their negative log-likelihood
    num_bytes: int  # of the text in UTF-8
    load: list[list[float]]  # [layer][expert] tokens that select it
    rows: list[list[float]]  # [layer][device] tokens that visit it
    dropped: float  # share of token-expert pairs that were dropped

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.num_bytes

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(self.nats / self.num_tokens)

    @property
    def fan_out(self) -> float:
        """Devices that a token visits in a layer, on average."""
        return sum(map(sum, self.rows)) / len(self.rows) / self.num_tokens

    @property
    def expert_balancedness(self) -> list[float]:
        """[layer] mean over maximum of the experts' loads."""
        return balancedness(torch.tensor(self.load)).tolist()

    def device_balancedness(self, num_groups: int) -> list[float]:
        """[layer] mean over maximum of the devices' loads, a device's load being that of its experts."""
        load = torch.tensor(self.load)
        return balancedness(load.view(len(load), num_groups, -1).sum(dim=-1)).tolist()

    @classmethod
    def of(cls, model: DeepseekV2ForCausalLM, routed: Routed, text: "HeldOut", *, name: str) -> Self:
        """Reads the text once under the settings of `routed`. What pads a shorter window takes part in dropping."""
        config, device = model.config, model.device
        assert config.n_group is not None
        nats, load, rows, dropped = 0.0, [], [], []
        windows = text.windows
        for start in tqdm(range(0, len(windows), BATCH_SIZE), desc=name, mininterval=2.0):
            ids, targets = _batch(windows[start : start + BATCH_SIZE], device)
            routed.clear()
            with torch.no_grad(), mixed_precision(device.type):
                logits = model(input_ids=ids, use_cache=False).logits
            nats += functional.cross_entropy(
                logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
            ).item()
            real = (targets != -100).flatten()
            sizes = {"num_experts": config.n_routed_experts}
            chosen = [topk_idx[real] for topk_idx in routed.topk_idx]
            load.append(torch.stack([expert_load(idx, **sizes) for idx in chosen]))
            rows.append(torch.stack([group_rows(idx, **sizes, num_groups=config.n_group) for idx in chosen]))
            dropped.append(torch.stack(routed.dropped).mean().item() if routed.dropped else 0.0)
        return cls(
            num_tokens=sum(len(window) - 1 for window in windows),
            nats=nats,
            num_bytes=text.num_bytes,
            load=torch.stack(load).sum(dim=0).tolist(),
            rows=torch.stack(rows).sum(dim=0).tolist(),
            dropped=float(np.mean(dropped)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Text that was kept out of training, in windows."""

    windows: Sequence[NDArray[np.uint16]]  # each up to LENGTH + 1 tokens, of which the first is given
    num_bytes: int  # UTF-8 of the tokens that are predicted

    @classmethod
    def of(cls, documents: Sequence[NDArray[np.uint16]], token_bytes: NDArray[np.int64], *, every: int = 1) -> Self:
        """Every token of the documents but their first is predicted once, with up to LENGTH tokens before it.

        documents: each <s>, its tokens, </s>. token_bytes: [vocab_size] UTF-8 bytes of each token, 0 for the marks.
        every: keeps one window of so many, for figures that need less text.
        """
        windows = [doc[start : start + LENGTH + 1] for doc in documents for start in range(0, len(doc) - 1, LENGTH)]
        kept = windows[::every]
        return cls(windows=kept, num_bytes=sum(int(token_bytes[window[1:]].sum()) for window in kept))


def _batch(windows: Sequence[NDArray[np.uint16]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets [batch, length] int64; the target of what pads a shorter window is -100."""
    length = max(map(len, windows)) - 1
    ids = torch.zeros(len(windows), length, dtype=torch.int64)
    targets = torch.full_like(ids, -100)
    for row, window in enumerate(windows):
        tokens = torch.from_numpy(window.astype(np.int64))
        ids[row, : len(window) - 1] = tokens[:-1]
        targets[row, : len(window) - 1] = tokens[1:]
    return ids.to(device), targets.to(device)
