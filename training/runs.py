"""The two runs of the nano model: with the balance losses, and without them for comparison."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import DeepseekV2ForCausalLM

from router.balance import BalanceWeights
from training.loop import TrainConfig, train

# The paper's weights, 0.003, 0.05 and 0.02, are for batches of millions of tokens. With our few thousand, devices were
# still at 0.65 to 0.86 of balance after 300 steps of a trial.
ALPHAS = BalanceWeights(expert=0.01, device=0.3, communication=0.1)
COMPARED_STEPS = 400  # the length of the shorter run; both are compared after so many steps
RUNS: Mapping[str, TrainConfig] = {
    "balanced": TrainConfig(steps=1200, snapshot_at=COMPARED_STEPS, alphas=ALPHAS),
    "unbalanced": TrainConfig(
        steps=1200,
        stop_at=COMPARED_STEPS,
        snapshot_at=COMPARED_STEPS,
        alphas=BalanceWeights(expert=0.0, device=0.0, communication=0.0),
    ),
}


def run(name: str, work: Path) -> DeepseekV2ForCausalLM:
    """Trains what is missing of a run; says on which device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = np.load(work / "tokens_train.npy")
    print(f"run {name}: {RUNS[name].last_step} steps on {device}, {torch.get_num_threads()} threads", flush=True)
    return train(RUNS[name], tokens, work / "runs" / name, device=device)
