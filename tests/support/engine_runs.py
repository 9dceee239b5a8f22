"""vLLM engines in a process of their own, one after the other, driven by lines: what the tests in tests/engine ask.

An engine needs a fresh process (vLLM's start trips over numba being imported in it, and a plugin stays), and importing
vLLM takes ten seconds. So one process without the plugin and one with it serve all tests.
"""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import PIPE
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.outputs import RequestOutput

Kind = Literal["plain", "remote"]
Prompts = Sequence[Sequence[int]]


class EngineError(Exception):
    """What the engine's process raised, as text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How far a request has come."""

    tokens: list[int]
    finish_reason: str | None  # None: it goes on
    stop_reason: str | None


class EngineProcess(AbstractContextManager["EngineProcess"]):
    """At most one engine at a time. `tell` sends a command and `answer` waits for its result; `do` is both.

    kind: "remote" activates the plugin as an attention replica does; "plain" is vLLM as it was installed.
    """

    def __init__(self, kind: Kind, *, log: Path) -> None:
        root = Path(__file__).parents[2]
        self._log = log
        with log.open("w") as out:
            self._process = subprocess.Popen(
                [sys.executable, __file__, kind],
                cwd=root,
                env=os.environ | {"PYTHONPATH": str(root)},
                stdin=PIPE,
                stdout=PIPE,
                stderr=out,
                text=True,
            )

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

    @property
    def pid(self) -> int:
        return self._process.pid

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

    # The commands.

    def load(self, arguments: Mapping[str, object]) -> None:
        """Replaces the engine by one with these keyword arguments of vLLM's LLM."""
        self.do("load", arguments=dict(arguments))

    def generate(self, prompts: Prompts, *, max_tokens: int) -> list[Outcome]:
        """Greedy continuations of a batch of prompts."""
        return [Outcome(**found) for found in self.do("generate", prompts=prompts, max_tokens=max_tokens)]

    def add(self, request_id: str, prompt: Sequence[int], *, max_tokens: int) -> None:
        self.do("add", request_id=request_id, prompt=prompt, max_tokens=max_tokens)

    def step(self, count: int = 1) -> dict[str, Outcome]:
        """Takes `count` steps, or as many as there are; all requests that had an output in them."""
        self.tell("step", count=count)
        return self.stepped()

    def stepped(self) -> dict[str, Outcome]:
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


class Child:
    """The other end: the engine's own process."""

    def __init__(self) -> None:
        self.llm: LLM | None = None
        self.read: list[str] = []
        self.outcomes: dict[str, Outcome] = {}

    def load(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm = None
        gc.collect()
        self.read.clear()
        self.outcomes.clear()
        self.llm = LLM(**arguments)

    def generate(self, prompts: Prompts, max_tokens: int) -> list[dict[str, object]]:
        for index, prompt in enumerate(prompts):
            self.add(f"batch-{index}", prompt, max_tokens)
        self.step(1_000_000)
        return [asdict(self.outcomes.pop(f"batch-{index}")) for index in range(len(prompts))]

    def add(self, request_id: str, prompt: Sequence[int], max_tokens: int) -> None:
        from vllm import SamplingParams

        assert self.llm is not None
        greedy = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        self.llm.llm_engine.add_request(request_id, {"prompt_token_ids": list(prompt)}, greedy)

    def step(self, count: int) -> dict[str, dict[str, object]]:
        assert self.llm is not None
        moved = set()
        for _ in range(count):
            if not self.llm.llm_engine.has_unfinished_requests():
                break
            for output in self.llm.llm_engine.step():
                self.outcomes[output.request_id] = _outcome(output)
                moved.add(output.request_id)
        return {request_id: asdict(self.outcomes[request_id]) for request_id in sorted(moved)}

    def abort(self, request_id: str) -> None:
        assert self.llm is not None
        self.llm.llm_engine.abort_request([request_id])

    def margins(self, prompt: list[int], tokens: list[int]) -> list[float]:
        from vllm import SamplingParams

        assert self.llm is not None
        ask = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        [output] = self.llm.generate({"prompt_token_ids": prompt + tokens}, ask, use_tqdm=False)
        assert output.prompt_logprobs is not None
        tail = output.prompt_logprobs[len(prompt) :]
        found = []
        for token, candidates in zip(tokens, tail, strict=True):
            assert candidates is not None
            found.append(max(entry.logprob for entry in candidates.values()) - candidates[token].logprob)
        return found

    def parameters(self) -> dict[str, int]:
        return {name: parameter.nbytes for name, parameter in self._worker().get_model().named_parameters()}

    def tensors_read(self) -> list[str]:
        return self.read

    def dummy_run(self, num_tokens: int) -> bool:
        """What vLLM does to profile and to warm up, outside any scheduled step. Whether the step is poisoned."""
        from cluster.step import CURRENT

        self._worker().model_runner._dummy_run(num_tokens)
        return CURRENT.poisoned

    def registered(self) -> list[str]:
        """Names of vLLM's layers that plugins have replaced in this process."""
        import vllm.plugins
        from vllm.model_executor.custom_op import op_registry_oot

        vllm.plugins.load_general_plugins()
        return sorted(op_registry_oot)

    def _worker(self) -> Any:
        assert self.llm is not None
        return self.llm.llm_engine.model_executor.driver_worker.worker  # type: ignore[attr-defined]


def _outcome(output: "RequestOutput") -> Outcome:
    [completion] = output.outputs
    return Outcome(
        tokens=list(completion.token_ids),
        finish_reason=completion.finish_reason,
        stop_reason=None if completion.stop_reason is None else str(completion.stop_reason),
    )


def _record_reads(read: list[str]) -> None:
    """Notes every tensor that safetensors reads for anybody; before vLLM takes its reference to it."""
    import safetensors
    import safetensors.torch

    original = safetensors.safe_open

    class Recording:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._file = original(*args, **kwargs)

        def __enter__(self) -> Self:
            self._file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._file.__exit__(*error)

        def get_tensor(self, name: str) -> Any:
            read.append(name)
            return self._file.get_tensor(name)

        def get_slice(self, name: str) -> Any:
            read.append(name)
            return self._file.get_slice(name)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    safetensors.safe_open = safetensors.torch.safe_open = Recording  # type: ignore[misc,assignment]


def main(kind: str) -> None:
    # vLLM prints to standard output; the answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from cluster.attention import prepare_environment

    prepare_environment(threads=1)
    if kind == "plain":
        os.environ["VLLM_PLUGINS"] = ""
    child = Child()
    _record_reads(child.read)
    import vllm  # noqa: F401  (ten seconds, while the test makes its checkpoint)

    for line in sys.stdin:
        request = json.loads(line)
        command = request.pop("command")
        started_s = time.monotonic()
        try:
            reply = {"result": getattr(child, command)(**request)}
        except Exception as error:  # whatever vLLM raises is the test's to judge
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(f"{command}: {time.monotonic() - started_s:.2f} s", file=sys.stderr)
        answers.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
