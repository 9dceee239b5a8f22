"""From a finished run to a checkpoint that a cluster serves: bfloat16 safetensors, tokenizer, card and licence."""

import json
import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import DeepseekV2ForCausalLM

from training.model import NANO, Routed, config_of, instrument
from training.state import load_state

MAX_BYTES = 50 * 1000 * 1000
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def export(run: Path, tokenizer: Path, out: Path) -> None:
    """Writes the newest checkpoint of a run as bfloat16 into `out`, with the tokenizer beside it.

    Raises ValueError where the run has none, or where the weights are more than MAX_BYTES.
    """
    model = DeepseekV2ForCausalLM(config_of(NANO))
    steps = load_state(run, model)
    if not steps:
        raise ValueError(f"{run} has no checkpoint to export; train it first")
    nn.Module.to(model, torch.bfloat16)
    model.generation_config.do_sample = False  # how to sample is for the caller to say
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    for name in _TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, out / name)
    weights = out / "model.safetensors"
    weights.chmod(0o644)  # transformers writes it for its owner alone
    size_bytes = weights.stat().st_size
    if size_bytes > MAX_BYTES:
        raise ValueError(f"{size_bytes=} of the weights are more than {MAX_BYTES=}; make the model smaller")


def load_exported(folder: Path) -> tuple[DeepseekV2ForCausalLM, Routed]:
    """The checkpoint as it is served, its bfloat16 numbers in float32, and the handle to its routed layers."""
    model = DeepseekV2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, instrument(model)


def num_parameters(folder: Path) -> int:
    """How many numbers the weights hold, from the file's header alone."""
    with (folder / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
    return sum(int(torch.tensor(shape).prod()) for shape in shapes)
