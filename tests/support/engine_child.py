"""The engine's side of engine_runs.py: a process that holds one vLLM engine and does what each line asks."""

import gc
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Self

from engine_runs import Outcome, Prompts

from cluster.drop_mark import take_mark

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.outputs import RequestOutput


class Child:
    """The public methods are the commands; what they return must be JSON."""

    def __init__(self) -> None:
        self._llm: LLM | None = None
        self._read: list[str] = []
        self._outcomes: dict[str, Outcome] = {}
        self._cached: dict[str, int] = {}
        _record_reads(self._read)

    def load(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        self._llm = None
        gc.collect()
        self._read.clear()
        self._outcomes.clear()
        self._llm = LLM(**arguments)

    def generate(self, prompts: Prompts, max_tokens: int) -> list[dict[str, object]]:
        for index, prompt in enumerate(prompts):
            self.add(f"batch-{index}", prompt, max_tokens)
        self.step(1_000_000)
        return [asdict(self._outcomes.pop(f"batch-{index}")) for index in range(len(prompts))]

    def sample(self, prompts: Prompts, params: list[dict[str, Any]]) -> list[dict[str, object]]:
        """One batch, each prompt with its own parameters: the tokens, and the log-probability of each (or 0)."""
        from vllm import SamplingParams

        assert self._llm is not None
        given = [SamplingParams.from_optional(detokenize=False, **one) for one in params]
        outputs = self._llm.generate([{"prompt_token_ids": list(p)} for p in prompts], given, use_tqdm=False)
        found: list[dict[str, object]] = []
        for output in outputs:
            [answer] = output.outputs
            tokens = list(answer.token_ids)
            rows = answer.logprobs or [None] * len(tokens)
            chosen = [row[token].logprob if row else 0.0 for token, row in zip(tokens, rows, strict=True)]
            found.append({"tokens": tokens, "logprobs": chosen})
        return found

    def add(self, request_id: str, prompt: Sequence[int], max_tokens: int) -> None:
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        self._engine.add_request(request_id, {"prompt_token_ids": list(prompt)}, greedy)

    def abort_within_step(self, request_id: str) -> None:
        """Ends a request while its next step is being computed, as a client that hangs up does."""
        scheduler = self._engine.engine_core.engine_core.scheduler
        original = scheduler.update_from_output

        def abort_first(*args: Any) -> Any:
            from vllm.v1.request import RequestStatus

            scheduler.update_from_output = original
            internal = [r for r in scheduler.requests if r.startswith(request_id)]
            scheduler.finish_requests(internal, RequestStatus.FINISHED_ABORTED)
            return original(*args)

        scheduler.update_from_output = abort_first
        self._engine.step()
        self._engine.abort_request([request_id])

    def step(self, count: int) -> dict[str, dict[str, object]]:
        moved = set()
        for _ in range(count):
            if not self._engine.has_unfinished_requests():
                break
            for output in self._engine.step():
                self._outcomes[output.request_id] = _outcome(output)
                self._cached[output.request_id] = output.num_cached_tokens or 0
                moved.add(output.request_id)
        return {request_id: asdict(self._outcomes[request_id]) for request_id in sorted(moved)}

    def outcome(self, request_id: str) -> dict[str, object]:
        return asdict(self._outcomes[request_id])

    def margins(self, prompt: list[int], tokens: list[int]) -> list[float]:
        from vllm import SamplingParams

        assert self._llm is not None
        ask = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        [output] = self._llm.generate({"prompt_token_ids": prompt + tokens}, ask, use_tqdm=False)
        assert output.prompt_logprobs is not None
        found = []
        for token, candidates in zip(tokens, output.prompt_logprobs[len(prompt) :], strict=True):
            assert candidates is not None
            found.append(max(entry.logprob for entry in candidates.values()) - candidates[token].logprob)
        return found

    def parameters(self) -> dict[str, int]:
        return {name: parameter.nbytes for name, parameter in self._worker.get_model().named_parameters()}

    def tensors_read(self) -> list[str]:
        return self._read

    def cached_tokens(self, request_id: str) -> int:
        """Prompt tokens of a request that were found in the prefix cache."""
        return self._cached[request_id]

    def dummy_run(self, num_tokens: int) -> bool:
        """What vLLM does to profile and to warm up, outside any scheduled step; whether it came out poisoned."""
        from cluster.step import CURRENT

        self._worker.model_runner._dummy_run(num_tokens)
        return CURRENT.poisoned

    def replaced_layers(self) -> list[str]:
        """Names of vLLM's layers that plugins have replaced in this process."""
        from vllm.model_executor.custom_op import op_registry_oot
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        return sorted(op_registry_oot)

    @property
    def _engine(self) -> Any:
        assert self._llm is not None
        return self._llm.llm_engine

    @property
    def _worker(self) -> Any:
        return self._engine.model_executor.driver_worker.worker


def _outcome(output: "RequestOutput") -> Outcome:
    [completion] = output.outputs
    return Outcome(
        tokens=list(completion.token_ids),
        finish_reason=completion.finish_reason,
        stop_reason=None if completion.stop_reason is None else str(completion.stop_reason),
        dropped_rows=take_mark(output),
    )


def _record_reads(read: list[str]) -> None:
    """Notes every tensor that safetensors reads for anybody; to be called before vLLM takes its reference to it."""
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
    import vllm.v1.engine.llm_engine  # noqa: F401  (ten seconds, while the tests make their checkpoints)

    for line in sys.stdin:
        request = json.loads(line)
        command = request.pop("command")
        started_s = time.monotonic()
        try:
            reply = {"result": getattr(child, command)(**request)}
        except Exception as error:  # whatever vLLM raises is the test's to judge
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(f"-- {command}: {time.monotonic() - started_s:.2f} s", file=sys.stderr)
        answers.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
