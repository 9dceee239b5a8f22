"""What the streams of a drill ask for: greedy and seeded, with and without penalties. Request i depends on i alone."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Surface = Literal["gRPC", "HTTP"]
Sampling = Mapping[str, float | int | bool]

# Every parameter is named, so that no default of a surface or of a checkpoint decides anything. The names are those of
# vLLM's SamplingParams, of expertmesh.v1.GenerateRequest and of an OpenAI body alike.
GREEDY: Sampling = {
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "ignore_eos": True,
}
PROBE_TOKENS = 24
_HTTP_SHARE, _SAMPLED_SHARE, _PENALTY_SHARE, _EOS_SHARE = 0.25, 0.5, 0.25, 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request."""

    name: str  # unique in a drill
    surface: Surface
    prompt: Sequence[int]  # token ids
    sampling: Sampling
    is_probe: bool = False  # asked right after a fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What requests are made from."""

    seed: int
    prompts: Sequence[Sequence[int]]
    num_tokens: tuple[int, int]  # of an answer: fewest, most


def make_ask(mix: Mix, index: int) -> Ask:
    """The request with this index."""
    rng = random.Random(f"request {mix.seed} {index}")
    sampling = {**GREEDY, "max_tokens": rng.randint(*mix.num_tokens)}
    if rng.random() < _SAMPLED_SHARE:
        sampling |= {
            "temperature": rng.choice([0.5, 0.8, 1.0]),
            "top_p": rng.choice([1.0, 0.95]),
            "top_k": rng.choice([0, 50]),
            "seed": rng.getrandbits(31),
        }
    if rng.random() < _PENALTY_SHARE:
        sampling |= {
            "repetition_penalty": rng.choice([1.0, 1.1]),
            "presence_penalty": rng.choice([0.0, 0.5]),
            "frequency_penalty": rng.choice([0.2, 0.5]),
        }
    sampling["ignore_eos"] = rng.random() >= _EOS_SHARE
    return Ask(
        name=str(index),
        surface="HTTP" if rng.random() < _HTTP_SHARE else "gRPC",
        prompt=mix.prompts[index % len(mix.prompts)],
        sampling=sampling,
    )


def make_probe(mix: Mix, index: int) -> Ask:
    """The short greedy request behind the fault with this index."""
    prompt = mix.prompts[index % len(mix.prompts)]
    sampling = {**GREEDY, "max_tokens": PROBE_TOKENS}
    return Ask(name=f"after fault {index}", surface="gRPC", prompt=prompt, sampling=sampling, is_probe=True)
