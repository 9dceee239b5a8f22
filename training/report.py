"""The report of the nano model, docs/nano.md: written by the recipe from what was measured, never by hand."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from training.arithmetic import (
    BFLOAT16_BYTES,
    BITS_MARK,
    DEEPSEEK_67B,
    DEEPSEEK_V2,
    DEVICE_MARK,
    EXPERT_MARK,
    FACTORS,
    PAPER_BITS,
    WITH,
    WITHOUT,
    Results,
    below,
    cache_table,
    change,
    fenced,
    mean,
    paper_saving,
    percent,
    table,
)
from training.card import about_text, how_again, settings_table, shape_table
from training.evaluate import BATCH_SIZE, LENGTH, Evaluation
from training.measure import CAPACITY_FACTORS, DEVICES, PART, SAMPLING


def write_report(work: Path, checkpoint: Path, docs: Path) -> None:
    """Writes `nano.md` and the figures in `nano/` into the folder `docs`.

    Raises OSError where something has not been measured yet, ImportError where matplotlib is missing.
    """
    from training.figures import draw  # the text alone does without matplotlib

    results = Results.read(work, checkpoint)
    draw(results, docs / "nano")
    (docs / "nano.md").write_text(markdown(results), encoding="utf-8")


def markdown(results: Results) -> str:
    """The report's text."""
    sections: tuple[Callable[[Results], str], ...]
    sections = (_opening, _text, _curves, _balance, _dropping, _devices, _bits, _cache, _samples, _again)
    return "\n".join(section(results).strip("\n") + "\n" for section in sections)


def _opening(results: Results) -> str:
    return f"""
# The nano checkpoint

A DeepSeek-V2 of {results.num_parameters / 1e6:.1f} million parameters, trained from nothing with the paper's balance \
losses, token dropping and device-limited routing.
It is for tests, first runs and examples, not for answers.
`make nano` trained it, measured it and wrote this page; the numbers come from its result files.

## What it is

{shape_table(results)}

Two runs were made, which differ in the balance losses and in how far they went.
The checkpoint is the one {WITH}; the one {WITHOUT} is there to compare with.
Each was run once, with one seed, so small differences between them mean little.

{settings_table({WITH: results.balanced, WITHOUT: results.unbalanced})}

The paper's alphas are 0.003, 0.05 and 0.02, for batches of millions of tokens.
In a trial with a few thousand tokens a step they left the least even layer at 0.65 of device balancedness after 300 \
steps, so these are larger; what they cost in loss is told below.
"""


def _text(results: Results) -> str:
    train_tokens = sum(row["tokens"] for row in results.text if not row["held_out"])
    return f"""
## The text

{about_text(results)}
Nothing of the text is in the repository.

The checkpoint has read {results.balanced.num_tokens / train_tokens:.2f} times as many tokens as the training text has.
Every figure below that is not about training is measured on the held-out documents.
"""


def _curves(results: Results) -> str:
    steps = results.unbalanced.num_steps
    whole = results.balanced.means("loss")
    ours, theirs = (run.means("loss", num_steps=steps).last for run in (results.balanced, results.unbalanced))
    bits = [results.held_out[name].bits_per_byte for name in ("balanced", "unbalanced")]
    factors = [
        (f"{title}, {name}", *(f"{value:.3f}" for value in run.means(factor, num_steps=steps)))
        for factor, title in FACTORS.items()
        for name, run in ((WITH, results.balanced), (WITHOUT, results.unbalanced))
    ]
    return f"""
## How it learnt

![The loss of both runs by step](nano/loss.png)

The checkpoint's loss was {whole.first:.3f} nats per token over the first tenth of its steps and {whole.last:.3f} over \
the last.
Over the last tenth of the first {steps:,} steps it was {ours:.3f} {WITH} and {theirs:.3f} {WITHOUT}.
After those steps the held-out text costs {bits[0]:.3f} bits per byte {WITH} and {bits[1]:.3f} {WITHOUT}, with nothing \
dropped; the first is {change(bits[0], bits[1])}.

![The three balance factors of both runs by step](nano/factors.png)

Each factor is 1 where everything is even, and its loss is alpha times the factor, in every layer.
The means over layers and over the first {steps:,} steps:

{table(("factor", "first tenth", "last tenth", "all"), factors)}
"""


def _balance(results: Results) -> str:
    after = f"after {results.unbalanced.num_steps:,} steps"
    names = {"served": "the checkpoint", "balanced": f"{WITH} {after}", "unbalanced": f"{WITHOUT} {after}"}
    by_name = {name: results.balancedness(name) for name in names}
    tables = [
        table(
            (f"{level} level", *names.values()),
            [
                (f"layer {layer}", *(f"{by_name[name][level][row]:.3f}" for name in names))
                for row, layer in enumerate(results.layers)
            ],
        )
        for level in ("expert", "device")
    ]
    served = by_name["served"]
    others = "\n".join(_levels(title, by_name[name]) for name, title in names.items())
    return f"""
## How even the load is

![Load of every expert in every layer, with balance losses and without](nano/load.png)

White lines part the devices.
Balancedness is mean load over maximum load.
It is 1 where all is even, and the smaller the more goes to one place.
The load of a device is that of its experts.

{tables[0]}

{tables[1]}

{others}

The checkpoint was meant to have {DEVICE_MARK} of device balancedness in every layer and {EXPERT_MARK} of expert \
balancedness on average.
Its least even layer is {below(min(served["device"]), DEVICE_MARK)} {DEVICE_MARK} at device level, and its mean is \
{below(mean(served["expert"]), EXPERT_MARK)} {EXPERT_MARK} at expert level.
"""


def _levels(what: str, balancedness: Mapping[str, Sequence[float]]) -> str:
    parts = [
        f"{level} level {mean(values):.3f} on average, {min(values):.3f} in the least even layer"
        for level, values in balancedness.items()
    ]
    return f"- {what[0].upper() + what[1:]}: {'; '.join(parts)}."


def _dropping(results: Results) -> str:
    steps = results.unbalanced.num_steps
    runs = [
        (WITH, results.balanced, results.balanced.num_steps),
        (f"{WITH}, the first {steps:,} steps", results.balanced, steps),
        (WITHOUT, results.unbalanced, steps),
    ]
    training = [(name, *(percent(share) for share in run.means("dropped", num_steps=n))) for name, run, n in runs]
    free, tight = results.held_out["part"], results.held_out[f"capacity {CAPACITY_FACTORS[0]}"]
    names = {"none": "part"} | {f"{factor}": f"capacity {factor}" for factor in CAPACITY_FACTORS}
    inference = [
        (label, *_quality(results.held_out[name]), percent(results.held_out[name].dropped))
        for label, name in names.items()
    ]
    return f"""
## Dropping tokens

A device takes at most the capacity factor times an even share of the rows; of the others those with the lowest \
affinity are dropped.
What is counted is the share of the pairs of a token and an expert that were dropped.
While training:

{table(("run", "first tenth", "last tenth", "all"), training)}

At inference a budget covers a batch of {BATCH_SIZE} x {LENGTH} tokens here, and no sequence is exempt; measured on \
one window of {PART}:

{table(("capacity factor", "perplexity", "bits per byte", "dropped"), inference)}

At {CAPACITY_FACTORS[0]} the bits per byte are {change(tight.bits_per_byte, free.bits_per_byte)}.
"""


def _devices(results: Results) -> str:
    trained, all_devices = results.config["topk_group"], results.config["n_group"]
    named = {devices: f"devices {devices}" for devices in DEVICES} | {trained: "part"}
    rows = [
        (
            f"{devices}, as trained" if name == "part" else devices,
            results.experts_of_a_token(devices),
            f"{results.held_out[name].fan_out:.2f}",
            *_quality(results.held_out[name]),
        )
        for devices, name in sorted(named.items())
    ]
    trained_so = results.held_out["part"]
    free, top_k = results.held_out[f"devices {all_devices}"], results.config["num_experts_per_tok"]
    short = "\n".join(
        f"Where {devices} may be visited, a token has only the {num_experts} experts there instead of {top_k}."
        for devices in sorted(named)
        if (num_experts := results.experts_of_a_token(devices)) < top_k
    )
    return f"""
## Limiting the devices

Fan-out is how many devices a token visits in a layer, on average; measured on one window of {PART}.

{table(("devices allowed", "experts a token", "fan-out", "perplexity", "bits per byte"), rows)}

{short}
Without a limit a token visits {free.fan_out:.2f} devices instead of {trained_so.fan_out:.2f}, \
and the bits per byte are {change(free.bits_per_byte, trained_so.bits_per_byte)}.
"""


def _bits(results: Results) -> str:
    ours = results.served.bits_per_byte
    rows = [("the checkpoint", f"{ours:.3f}")]
    rows += [(f"{name} -9e" if name == "xz" else name, f"{bits:.3f}") for name, bits in results.baselines.items()]
    return f"""
## Against what learns less

{table(("", "bits per byte"), rows)}

`xz` has read only the held-out text itself; the 5-gram counts runs of tokens in the training text (Kneser-Ney).
The checkpoint's {ours:.3f} bits per byte are {below(ours, BITS_MARK)} {BITS_MARK}, \
{below(ours, results.baselines["xz"])} those of `xz -9e`, and {below(ours, results.baselines["5-gram"])} those of the \
5-gram.
Its perplexity is {results.served.perplexity:.1f} per token.
"""


def _cache(results: Results) -> str:
    nano, reading, saving = results.attention, results.kv_cache, paper_saving()
    expected = nano.latent * BFLOAT16_BYTES
    return f"""
## The latent cache

In a running vLLM engine the cache takes {reading["bytes_per_token"]:,.0f} bytes a token, in {reading["dtype"]} and \
blocks of {reading["block_size"]}; arithmetic says {expected:,} ({change(reading["bytes_per_token"], expected)}).
The arithmetic, in bytes a token at {BFLOAT16_BYTES} bytes a number, and the latent's share of the others:

{cache_table({"nano": nano, "DeepSeek-V2": DEEPSEEK_V2})}

The paper counts multi-head attention as 2 x n_h x d_h numbers a layer, and d_h is {nano.v_head_dim} here.
With keys and values as wide as the model's own it is {nano.num_heads} x ({nano.qk_nope_head_dim} + \
{nano.qk_rope_head_dim} + {nano.v_head_dim}).
At {nano.num_heads} heads the latent cache is {below(nano.latent, nano.multi_head)} the first count \
({change(nano.latent, nano.multi_head)}) and {below(nano.latent, nano.multi_head_as_wide)} the second \
({change(nano.latent, nano.multi_head_as_wide)}).
By the first count a latent of this size pays from {nano.pays_from_heads} heads on; DeepSeek-V2 has \
{DEEPSEEK_V2.num_heads}.

The paper's saving of {percent(saving.quantized)} is not against multi-head attention.
It is against DeepSeek 67B, {DEEPSEEK_67B.num_layers} layers of {DEEPSEEK_67B.num_kv_heads} key-value heads of \
{DEEPSEEK_67B.head_dim}, at {8 * BFLOAT16_BYTES} bits a number, and counts {PAPER_BITS} bits a number for DeepSeek-V2.
At equal precision it is {percent(saving.equal_precision)}.
"""


def _samples(results: Results) -> str:
    how = ", ".join(f"{name} {value}" for name, value in SAMPLING.items())
    blocks = "\n\n".join(
        f"{fenced(sample['prompt'].rstrip())}\n\ngoes on as\n\n{fenced(sample['text'])}" for sample in results.samples
    )
    return f"""
## How it writes

The first text for each prompt, with one seed for all, as it came out ({how}).

{blocks}
"""


def _again(results: Results) -> str:
    return f"""
## Doing it again

{how_again({WITH: results.balanced, WITHOUT: results.unbalanced})}
"""


def _quality(evaluation: Evaluation) -> tuple[str, str]:
    return f"{evaluation.perplexity:.2f}", f"{evaluation.bits_per_byte:.3f}"
