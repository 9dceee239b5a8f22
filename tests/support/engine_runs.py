"""vLLM engines in a process of their own, one after the other, driven by lines: what the tests in tests/engine ask.

An engine needs a fresh process (vLLM's start trips over numba being imported in it, and a plugin stays), and importing
vLLM takes ten seconds. So one process without the plugin and one with it serve all tests.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from cluster.attention import engine_arguments, plain_engine_arguments
from cluster.config import AttentionConfig
from experts.served_model import ServedModel

Kind = Literal["plain", "remote"]
Prompts = Sequence[Sequence[int]]

MAX_MODEL_LEN = 256
VOCABULARY = 512
STEP_TIMEOUT_S = 3.0
_KV_CACHE_MIB = 64
_ENGINE = {"skip_tokenizer_init": True, "max_num_seqs": 16}


class EngineError(Exception):
    """What the engine's process raised, as text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How far a request has come."""

    tokens: list[int]
    finish_reason: str | None  # None: it goes on
    stop_reason: str | None
    dropped_rows: int = 0  # in its steps; known when it is finished


class EngineProcess:
    """At most one engine at a time. `tell` sends a command and `answer` waits for its result; `do` is both.

    kind: "remote" activates the plugin as an attention replica does; "plain" is vLLM as it was installed.
    log: file for what vLLM prints.
    """

    def __init__(self, kind: Kind, *, log: Path) -> None:
        root = Path(__file__).parents[2]
        self._log = log
        with log.open("w") as out:
            self._process = subprocess.Popen(
                [sys.executable, Path(__file__).with_name("engine_child.py"), kind],
                cwd=root,
                # Torch reads the number of threads when it is imported.
                env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
                stdin=PIPE,
                stdout=PIPE,
                stderr=out,
                text=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def tell(self, command: str, **arguments: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """The last command's result; raises EngineError where it raised."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the engine's process has died:\n{self._log.read_text()[-3000:]}"
        result = json.loads(line)
        if "error" in result:
            raise EngineError(result["error"])
        return result["result"]

    def do(self, command: str, **arguments: object) -> Any:
        self.tell(command, **arguments)
        return self.answer()

    def load(self, arguments: Mapping[str, object]) -> None:
        """Replaces the engine by one with these keyword arguments of vLLM's LLM."""
        self.do("load", arguments=dict(arguments))

    def generate(self, prompts: Prompts, *, max_tokens: int) -> list[Outcome]:
        """Greedy continuations of a batch of prompts."""
        self.tell("generate", prompts=prompts, max_tokens=max_tokens)
        return self.generated()

    def generated(self) -> list[Outcome]:
        """The result of a `generate` that was told."""
        return [Outcome(**found) for found in self.answer()]

    def add(self, request_id: str, prompt: Sequence[int], *, max_tokens: int) -> None:
        self.do("add", request_id=request_id, prompt=prompt, max_tokens=max_tokens)

    def step(self, count: int = 1) -> dict[str, Outcome]:
        """Takes `count` steps, or as many as there are; every request that had an output in them."""
        self.tell("step", count=count)
        return self.stepped()

    def stepped(self) -> dict[str, Outcome]:
        """The result of a `step` that was told."""
        return {request_id: Outcome(**found) for request_id, found in self.answer().items()}

    def finish(self) -> dict[str, Outcome]:
        """Steps until no request is left."""
        return self.step(1_000_000)

    def margins(self, prompt: Sequence[int], tokens: Sequence[int]) -> list[float]:
        """By teacher forcing, per token: log-probability of the likeliest one less its own; 0 where it is that one."""
        return self.do("margins", prompt=prompt, tokens=tokens)

    def parameters(self) -> dict[str, int]:
        """Size in bytes of every parameter of the model, by name."""
        return self.do("parameters")

    def tensors_read(self) -> list[str]:
        """Name of every tensor read through safetensors since the last load began."""
        return self.do("tensors_read")


def make_prompts(count: int, *, seed: int = 0, shortest: int = 3, longest: int = 30) -> list[list[int]]:
    """Random token ids, of mixed length."""
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCABULARY) for _ in range(rng.randint(shortest, longest))] for _ in range(count)]


def plain_arguments(checkpoint: Path, *, dtype: str = "float32", **changes: object) -> dict[str, object]:
    """Of an unmodified engine."""
    model = ServedModel(checkpoint=str(checkpoint), dtype=dtype, num_groups=1, max_rows=512, runtime_dir="")
    arguments = plain_engine_arguments(model, max_model_len=MAX_MODEL_LEN, kv_cache_mib=_KV_CACHE_MIB)
    return arguments | _ENGINE | changes


def remote_arguments(
    model: ServedModel,
    *,
    member_id: str = "attention",
    max_model_len: int = MAX_MODEL_LEN,
    start_timeout_s: float = 10.0,
    **changes: object,
) -> dict[str, object]:
    """Of an engine whose experts are on the plane that serves `model`."""
    config = AttentionConfig(kv_cache_mib=_KV_CACHE_MIB, step_timeout_s=STEP_TIMEOUT_S, start_timeout_s=start_timeout_s)
    arguments = engine_arguments(model, config, max_model_len=max_model_len, member_id=member_id)
    return arguments | _ENGINE | changes


# What the fixtures in tests/engine/conftest.py are.

PROMPTS = make_prompts(8)
MAX_TOKENS = 16


class Checkpoints(Protocol):
    """The folder of a preset's checkpoint."""

    def __call__(self, preset: str) -> Path: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one engine did with PROMPTS, MAX_TOKENS each, and what it is made of."""

    outcomes: list[Outcome]
    parameters: Mapping[str, int]  # size in bytes by name
    tensors_read: Sequence[str]


class Reference(Protocol):
    """The run of an unmodified engine."""

    def __call__(self, preset: str, dtype: str = "float32") -> Run: ...


class RemoteRun(Protocol):
    """The run of an engine whose experts are on `num_groups` expert groups."""

    def __call__(self, preset: str, num_groups: int = 4, dtype: str = "float32") -> Run: ...


def run(engine: EngineProcess) -> Run:
    return Run(
        outcomes=engine.generate(PROMPTS, max_tokens=MAX_TOKENS),
        parameters=engine.parameters(),
        tensors_read=engine.tensors_read(),
    )
