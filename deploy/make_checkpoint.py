"""Small random checkpoints for tests, benchmarks and a first run: real layouts, random numbers, made in seconds.

    python -m deploy.make_checkpoint OUT --preset nano

The same preset, seed and library versions give the same bytes. Nothing is fetched: the tokenizer is trained on the
documentation that comes with Python. The text that such a model writes means nothing, but it depends on every part
of it: on the prompt, on the attention and on the routed experts, so a wrong sum of experts shows as wrong tokens.
"""

import argparse
import ast
import importlib
import json
import math
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from deploy.checkpoint_presets import PRESETS
from deploy.tokenizer import SPECIAL_TOKENS, byte_level_tokenizer
from experts.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Progress = Callable[[str], None]


_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def make_checkpoint(
    out: Path,
    *,
    preset: str,
    seed: int = 0,
    max_shard_size: str = "1GB",
    on_progress: Progress | None = None,
    **overrides: object,
) -> Path:
    """Writes a random checkpoint (bfloat16) with its tokenizer into the folder `out`, and returns it.

    preset: one of PRESETS; overrides: fields of its config.json to change.
    max_shard_size: a small one, such as "2MB", gives several files and an index.
    Raises ConfigError for an unknown preset.
    """
    if preset not in PRESETS:
        raise ConfigError(f"there is no preset {preset!r}; choose one of {', '.join(PRESETS)}")
    say = on_progress or (lambda _: None)
    fields = {**PRESETS[preset].fields, **overrides}
    out.mkdir(parents=True, exist_ok=True)
    say("training the tokenizer")
    _save_tokenizer(out, vocab_size=_int(fields, "vocab_size"), context=_int(fields, "max_position_embeddings"))
    say("drawing the weights")
    model = _random_model(PRESETS[preset].family, fields, seed)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    say(f"writing {millions:.1f} million parameters to {out}")
    model.save_pretrained(out, max_shard_size=max_shard_size)
    return out


def _random_model(family: str, fields: Mapping[str, object], seed: int) -> "PreTrainedModel":
    transformers = importlib.import_module("transformers")
    config: PreTrainedConfig = getattr(transformers, f"{family}Config")(**fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with _no_init():
            model: PreTrainedModel = getattr(transformers, f"{family}ForCausalLM")(config)
        _draw_weights(model, seed)
    # Sampling defaults belong to the caller; the file only names the tokens that start and end a text.
    model.generation_config.do_sample = False
    for parameter in model.parameters():  # not the buffers: the selection bias is float32 in published checkpoints too
        parameter.data = parameter.data.to(torch.bfloat16)
    return model.eval()


@contextmanager
def _no_init() -> Iterator[None]:
    """Skips the library's own initialisation: every number is drawn anew afterwards."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        yield


@torch.no_grad()
def _draw_weights(model: "PreTrainedModel", seed: int) -> None:
    """Normal weights scaled by fan-in, so that every part moves the result and no part drowns the others."""
    generator = torch.Generator().manual_seed(seed)
    named = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n.endswith("correction_bias"))]
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        if tensor.ndim == 1 and not name.endswith("correction_bias"):
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            tensor.normal_(0.0, _deviation(name, tensor), generator=generator)
        if name == "lm_head.weight":
            # A text ends by its length alone: which token ends one must not hang on a random number.
            tensor[: len(SPECIAL_TOKENS)] = 0.0


def _deviation(name: str, tensor: torch.Tensor) -> float:
    """Standard deviation of a tensor [..., out, in]: gain / sqrt(in)."""
    if name.endswith("correction_bias"):
        return 0.1  # of the order of the differences between sigmoid scores, so that it changes selections
    if "embed_tokens" in name:
        return 1.0
    gain = 1.0
    if "experts." in name and "shared" not in name:
        gain = 1.5  # three of these multiply, and a routing weight below 1 follows
    elif name.endswith(("q_proj.weight", "q_b_proj.weight")):
        gain = 1.5  # attention looks at some tokens more than at others; much sharper, it magnifies rounding
    elif name.startswith("lm_head"):
        gain = 3.0  # log-probabilities of a trained model's order: the likeliest token stands out
    return gain / math.sqrt(tensor.shape[-1])


def _save_tokenizer(out: Path, *, vocab_size: int, context: int) -> None:
    tokenizer = byte_level_tokenizer(
        _local_text(), vocab_size=vocab_size, context=context, chat_template=_CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(out)


def _local_text() -> Iterator[str]:
    """English that every Python installation has: the help topics, and the docstrings of the standard library."""
    try:
        yield from importlib.import_module("pydoc_data.topics").topics.values()
    except ImportError:  # some distributions leave the help topics out
        pass
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:80]:
        module = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
        for node in ast.walk(module):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                yield text


def _int(fields: Mapping[str, object], name: str) -> int:
    value = fields[name]
    if not isinstance(value, int):
        raise ConfigError(f"{name} is {value!r}, and must be a whole number")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--preset", choices=list(PRESETS), default="nano", help="its family and size (default: nano)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files (default: 0)")
    parser.add_argument("--max-shard-size", default="1GB", help="largest file; a small one gives several (such as 2MB)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=JSON", help="change a field of config.json"
    )


def run(args: argparse.Namespace) -> int:
    """Makes what the arguments say; the exit code. Raises ConfigError."""
    try:
        overrides = {key: json.loads(value) for key, _, value in (item.partition("=") for item in args.set)}
    except json.JSONDecodeError as error:
        raise ConfigError(f"--set wants FIELD=JSON, such as hidden_size=512: {error}") from None
    make_checkpoint(
        args.out,
        preset=args.preset,
        seed=args.seed,
        max_shard_size=args.max_shard_size,
        on_progress=print,
        **overrides,
    )
    return 0
