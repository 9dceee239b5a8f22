"""Checkpoints of a training run: whole or not there, whenever the run is killed."""

import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

NAME = "state.pt"


def save_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int) -> None:
    """Replaces the run's checkpoint by one after `steps` steps."""
    partial = folder / f"{NAME}.partial"
    with partial.open("wb") as file:
        torch.save({"steps": steps, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / NAME)


def save_snapshot(folder: Path, model: nn.Module, *, steps: int) -> None:
    """Keeps the weights as they are after `steps` steps, beside the checkpoint."""
    partial = folder / "snapshot.partial"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, partial)
    partial.replace(snapshot_file(folder, steps=steps))


def snapshot_file(folder: Path, *, steps: int) -> Path:
    return folder / f"step-{steps}.safetensors"


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Reads the run's checkpoint into the model and the optimizer; after how many steps it was taken, 0 if none."""
    file = folder / NAME
    if not file.exists():
        return 0
    state = torch.load(file, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    return state["steps"]
