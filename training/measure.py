"""What the report tells, measured once and kept: each stage writes a JSON file into `work/results`.

held_out.json   {name: evaluation}, the text that no run has read:
                "served" is the exported checkpoint; "capacity 1.0", "1.25", "1.5" the same with token dropping;
                "devices 1", "2", "8" the same with that many devices a token may visit (3 is as trained);
                "balanced", "unbalanced" the two runs after COMPARED_STEPS steps, nothing dropped
baselines.json  {"xz": bits per byte, "5-gram": bits per byte}
kv_cache.json   {"bytes_per_token": ..., "dtype": ..., "num_blocks": ..., "block_size": ...}, of a running engine
samples.json    [{"prompt": ..., "text": ...}], as the checkpoint goes on, with SAMPLING
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from training.baselines import ngram_bits_per_byte, xz_bits_per_byte
from training.evaluate import Evaluation, HeldOut
from training.export import load_exported
from training.model import NANO, build
from training.runs import COMPARED_STEPS
from training.state import snapshot_file
from training.text import load_documents

CAPACITY_FACTORS = (1.0, 1.25, 1.5)
DEVICES = (1, 2, 8)
PART = 3
PROMPTS = (
    "It is a truth universally acknowledged, that",
    "Fellow-Citizens of the Senate and House of Representatives:\n\n",
    "MACBETH.\n",
)
SAMPLING = {"max_new_tokens": 80, "do_sample": True, "temperature": 0.7, "top_p": 0.95}


def measure(work: Path, checkpoint: Path) -> None:
    """Writes the results that are missing; those of another checkpoint are measured anew."""
    results = work / "results"
    results.mkdir(parents=True, exist_ok=True)
    stages: dict[str, Callable[[], object]] = {
        "baselines": lambda: baselines(work),
        "held_out": lambda: evaluations(work, checkpoint),
        "kv_cache": lambda: kv_cache(checkpoint),
        "samples": lambda: samples(checkpoint),
    }
    for name, stage in stages.items():
        file = results / f"{name}.json"
        newest = (checkpoint / "model.safetensors").stat().st_mtime if name != "baselines" else 0.0
        if not file.exists() or file.stat().st_mtime < newest:
            print(f"measuring {name}", flush=True)
            file.write_text(json.dumps(stage(), indent=1))


def baselines(work: Path) -> dict[str, float]:
    """Bits per byte of the held-out text, by what knows less than a language model."""
    documents = [document for document in load_documents(work / "downloads") if document.held_out]
    num_bytes = sum(len(document.text.encode()) for document in documents)
    train, held_out = np.load(work / "tokens_train.npy"), np.load(work / "tokens_held_out.npy")
    return {
        "xz": xz_bits_per_byte(document.text for document in documents),
        "5-gram": ngram_bits_per_byte(train, held_out, num_bytes, vocab_size=_vocab_size(), order=5),
    }


def evaluations(work: Path, checkpoint: Path) -> dict[str, dict[str, object]]:
    """Every evaluation of the report by name."""
    return {name: asdict(evaluation) for name, evaluation in _evaluations(work, checkpoint)}


def _evaluations(work: Path, checkpoint: Path) -> Iterator[tuple[str, Evaluation]]:
    text, part = read_held_out(work), read_held_out(work, every=PART)
    model, routed = load_exported(checkpoint)
    yield "served", Evaluation.of(model, routed, text, name="served")
    yield "part", Evaluation.of(model, routed, part, name="part")
    for factor in CAPACITY_FACTORS:
        routed.capacity_factor = factor
        yield f"capacity {factor}", Evaluation.of(model, routed, part, name=f"capacity {factor}")
    routed.capacity_factor = None
    for devices in DEVICES:
        routed.max_groups = devices
        yield f"devices {devices}", Evaluation.of(model, routed, part, name=f"devices {devices}")
    for name in ("balanced", "unbalanced"):
        model, routed = build(seed=0)
        model.load_state_dict(load_file(snapshot_file(work / "runs" / name, steps=COMPARED_STEPS)))
        yield name, Evaluation.of(model.eval(), routed, text, name=name)


def read_held_out(work: Path, *, every: int = 1) -> HeldOut:
    """The held-out documents; of their windows one of `every`."""
    rows = [row for row in json.loads((work / "text.json").read_text()) if row["held_out"]]
    tokens = np.load(work / "tokens_held_out.npy")
    ends = np.cumsum([row["tokens"] for row in rows])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    # A token of a byte-level BPE is written with one character a byte.
    token_bytes = np.array([len(token) for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))])
    token_bytes[tokenizer.all_special_ids] = 0
    text = HeldOut.of(np.split(tokens, ends[:-1]), token_bytes, every=every)
    assert every > 1 or text.num_bytes == sum(row["bytes"] for row in rows)
    return text


def kv_cache(checkpoint: Path) -> dict[str, object]:
    """Asks a running vLLM engine; in a process of its own, since an engine is not for sharing one."""
    command = [sys.executable, "-m", "training.kv_cache", str(checkpoint)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parents[1])
    return json.loads(answer.stdout.splitlines()[-1])


def samples(checkpoint: Path) -> list[dict[str, str]]:
    """How the checkpoint goes on from PROMPTS: the first text of one seed, not the best of several."""
    model, _ = load_exported(checkpoint)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    torch.manual_seed(0)
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(prompt)]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **SAMPLING)  # type: ignore[misc]
        texts.append({"prompt": prompt, "text": tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)})
    return texts


def _vocab_size() -> int:
    size = NANO["vocab_size"]
    assert isinstance(size, int)
    return size
