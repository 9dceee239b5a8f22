"""What bench_serving is asked to measure: its command line, and the checkpoint and config that come of it."""

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.command_line import count, counts
from benchmarks.serving_fleet import Engines
from benchmarks.serving_setups import DEFAULT_SETUPS, TENSOR_PARALLEL, Setup, parse_setup, tensor_parallel_cores
from deploy.checkpoint_presets import PRESETS
from deploy.config import DEFAULT_CONFIG, load, resolve, state_dir
from deploy.make_checkpoint import make_checkpoint
from experts.errors import ConfigError

# What stands in for each option that was left out.
FULL: Mapping[str, object] = {
    "checkpoint": "bench-300m",
    "streams": (1, 8, 32, 64),
    "output": 64,
    "rounds": 5,
    "setups": tuple(map(parse_setup, DEFAULT_SETUPS)),
}
QUICK: Mapping[str, object] = {
    "checkpoint": "nano",
    "streams": (1, 8),
    "output": 16,
    "rounds": 2,
    "setups": tuple(map(parse_setup, ("vllm", "D=4"))),
}
VLLM_MIN_BATCHED_TOKENS = 2048  # to which vLLM raises the tokens of a step by itself, for latent attention on a CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One run."""

    checkpoint: str  # a preset, `embedded` or a folder
    dtype: str
    streams: tuple[int, ...]
    prompt: int  # tokens
    output: int  # tokens
    rounds: int
    setups: tuple[Setup, ...]
    seed: int
    out: Path | None  # None: the results are shown only
    baseline_threads: int
    attention_threads: int | None  # None: the product's default
    expert_threads: int | None
    kv_cache_mib: int

    @property
    def title(self) -> str:
        name = self.checkpoint if self.checkpoint in PRESETS else Path(self.checkpoint).name
        return f"{name}, {self.dtype}, {self.prompt} tokens in, {self.output} out"


def parse(arguments: list[str] | None = None) -> Options:
    """The command line; ends the process with a sentence where it is wrong, as argparse does."""
    parser = argparse.ArgumentParser(prog="bench_serving", description="vLLM and every way to split it, side by side.")
    parser.add_argument("--quick", action="store_true", help="a first look in minutes: nano, two setups, nothing kept")
    parser.add_argument("--checkpoint", metavar="PRESET|DIR", help=f"{', '.join(PRESETS)}, or a folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--streams", type=counts, metavar="N,N", help="how many requests run at the same time")
    parser.add_argument("--prompt", type=count, default=32, metavar="N", help="tokens in each prompt (default: 32)")
    parser.add_argument("--output", type=count, metavar="N", help="tokens of each answer")
    parser.add_argument("--rounds", type=count, metavar="N")
    parser.add_argument("--setups", type=_setups, metavar="A,B", help=f"of {', '.join(DEFAULT_SETUPS)}, or any D and x")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default: 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go; without it they are shown only")
    parser.add_argument("--baseline-threads", type=count, default=2, metavar="N", help="compute threads of vLLM (2)")
    parser.add_argument("--attention-threads", type=count, metavar="N", help="of the engines of a setup together")
    parser.add_argument("--expert-threads", type=count, metavar="N", help="of each expert group")
    parser.add_argument("--kv-cache-mib", type=count, default=256, metavar="N", help="of each engine (256)")
    given = vars(parser.parse_args(arguments))
    missing = QUICK if given.pop("quick") else FULL
    filled = {name: missing.get(name) if value is None else value for name, value in given.items()}
    return Options(**filled)  # type: ignore[arg-type]


def engines_of(options: Options) -> Engines:
    """Makes the checkpoint if it is a preset that is not there yet. Raises ConfigError for what cannot be served."""
    defaults = load(DEFAULT_CONFIG)
    attention = defaults.attention
    threads = {
        "attention.threads": options.attention_threads or attention.threads,
        "experts.threads": options.expert_threads or defaults.experts.threads,
    }
    config = load(
        DEFAULT_CONFIG,
        {
            **threads,
            "model.checkpoint": _folder_of(options.checkpoint),
            "model.dtype": options.dtype,
            "model.max_model_len": max(defaults.model.max_model_len, options.prompt + options.output),
            "attention.max_num_seqs": max(attention.max_num_seqs, *options.streams),
            "attention.max_num_batched_tokens": VLLM_MIN_BATCHED_TOKENS,
            "attention.kv_cache_mib": options.kv_cache_mib,
            "experts.groups": 1,
        },
    )
    resolved = resolve(config)
    for setup in options.setups:
        if setup.num_groups:
            resolved.checkpoint.shape.check_num_groups(setup.num_groups)
        if setup.name == TENSOR_PARALLEL:
            tensor_parallel_cores(sorted(os.sched_getaffinity(0)), options.baseline_threads)
    return Engines(checkpoint=resolved.checkpoint, config=config, baseline_threads=options.baseline_threads)


def settings_of(options: Options, engines: Engines) -> dict[str, str]:
    """What was measured, in words."""
    config = engines.config
    return {
        "requests": f"{options.prompt} random tokens in, {options.output} greedy tokens out, "
        f"all streams submitted at once; {options.rounds} rounds",
        "threads": f"vllm {engines.baseline_threads}, {TENSOR_PARALLEL} {engines.baseline_threads} over both ranks, "
        f"attention {config.attention.threads} over all engines of a setup, experts {config.experts.threads} a group",
        "engines": f"eager, no prefix cache, at most {config.attention.max_num_seqs} sequences, "
        f"KV cache of {config.attention.kv_cache_mib} MiB each",
    }


def _folder_of(checkpoint: str) -> str:
    """The folder of a checkpoint; a preset's is made once for each version of its fields."""
    if checkpoint not in PRESETS:
        return checkpoint
    preset = PRESETS[checkpoint]
    fields = json.dumps([preset.family, dict(preset.fields)], sort_keys=True, default=dict)
    folder = state_dir() / "checkpoints" / f"{checkpoint}-{hashlib.sha256(fields.encode()).hexdigest()[:8]}"
    if not folder.exists():
        # Under another name until it is whole: a run that is interrupted must not leave half a checkpoint behind.
        making = folder.with_suffix(".part")
        shutil.rmtree(making, ignore_errors=True)
        print(f"making the checkpoint {checkpoint}", flush=True)
        make_checkpoint(making, preset=checkpoint)
        making.rename(folder)
    return str(folder)


def _setups(text: str) -> tuple[Setup, ...]:
    try:
        return tuple(dict.fromkeys(parse_setup(part.strip()) for part in text.split(",")))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
