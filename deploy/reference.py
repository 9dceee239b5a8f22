"""One unmodified vLLM process: what the cluster is compared with. Run as `python -m deploy.reference ENGINE_ARGUMENTS`.

The process imports nothing of ours that touches vLLM, and refuses to answer where a plugin replaced vLLM's experts.
It loads the engine at once, then reads one job from standard input and writes one report to standard output, both JSON.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypedDict

from experts.errors import ServingError

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.logprobs import Logprob
    from vllm.outputs import RequestOutput

TIMEOUT_S = 1800.0  # start and job together
NUM_CANDIDATES = 20  # best logits of a position that are compared; vLLM gives no more unless told to
Sequences = list[list[int]]  # token ids, [num_prompts][num_tokens]
Logits = dict[int, float]  # token id -> logit: the best ones of a position, and the chosen one


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    prompts: Sequences
    num_tokens: int  # of each answer
    passes: dict[str, Sequences]  # the cluster's answers, by the name of the pass


class Forced(TypedDict):
    """Sequences, and each token's distance from the largest logit when vLLM reads them as a prompt."""

    tokens: Sequences
    margins: list[list[float]]


class Report(TypedDict):
    together: Forced  # vLLM's own greedy tokens, all prompts in one batch
    one_by_one: Forced
    passes: dict[str, Forced]
    largest_change: float
    largest_logit: float


class ReferenceProcess:
    """Owns the process: `start`, then one `report`."""

    def __init__(self, *, threads: int) -> None:
        """threads: of its computation."""
        self._threads = threads
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="em-reference-")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._folder.cleanup()

    def start(self, engine_arguments: Mapping[str, object]) -> None:
        """Begins to load, and returns. engine_arguments: JSON values, keyword arguments of vLLM's LLM."""
        root = Path(__file__).parents[1]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "deploy.reference", json.dumps(dict(engine_arguments))],
                cwd=root,
                env=self._environment(root),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C is for us, and we end it
            )

    def report(self, job: Job) -> Report:
        """Answers the job, and the process ends. Raises ServingError with the last line it said where it fails."""
        assert self._process is not None, "start comes first"
        try:
            answer, _ = self._process.communicate(json.dumps(asdict(job)), timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise ServingError(f"the reference process did not answer within {TIMEOUT_S:.0f} s") from None
        if self._process.returncode:
            said = self._log.read_text(errors="replace").strip().splitlines() or ["nothing"]
            raise ServingError(f"the reference process failed, and said at last: {said[-1]}")
        return json.loads(answer)

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(10)

    @property
    def _log(self) -> Path:
        return Path(self._folder.name) / "log"

    def _environment(self, root: Path) -> dict[str, str]:
        ours = {name for name in os.environ if name.startswith(("EXPERTMESH_", "VLLM_", "RAY_"))}
        return {name: value for name, value in os.environ.items() if name not in ours} | {
            "PYTHONPATH": str(root),
            "VLLM_PLUGINS": "",  # an allow-list: no plugin, ours included
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CACHE_ROOT": f"{self._folder.name}/vllm",
            "VLLM_CONFIG_ROOT": f"{self._folder.name}/vllm",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(self._threads),  # rounding in 16 bits depends on it
        }


def answer(llm: "LLM", job: Job) -> Report:
    """Generates in both compositions, and forces every sequence: vLLM's own, and the cluster's."""
    together, together_logits = _generate(llm, job.prompts, job.num_tokens)
    alone = [_generate(llm, [prompt], job.num_tokens) for prompt in job.prompts]
    one_by_one = [tokens for answers, _ in alone for tokens in answers]
    alone_logits = [logits for _, many in alone for logits in many]
    changes: list[float] = []
    largest = 0.0
    own: list[Forced] = []
    for tokens, generated in ((together, together_logits), (one_by_one, alone_logits)):
        forced, read = _force(llm, job.prompts, tokens)
        own.append(forced)
        for before, after in zip(_flat(generated), _flat(read), strict=True):
            changes.append(change(before, after))
            largest = max(largest, *map(abs, after.values()))
    return Report(
        together=own[0],
        one_by_one=own[1],
        passes={name: _force(llm, job.prompts, tokens)[0] for name, tokens in job.passes.items()},
        largest_change=max(changes, default=0.0),
        largest_logit=largest,
    )


def change(before: Logits, after: Logits) -> float:
    """The largest change of a difference between two logits of one position that both name."""
    deltas = [before[token] - after[token] for token in before if token in after]
    return max(deltas) - min(deltas) if deltas else 0.0


def _generate(llm: "LLM", prompts: Sequences, num_tokens: int) -> tuple[Sequences, list[list[Logits]]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=NUM_CANDIDATES)
    outputs = _run(llm, prompts, params)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return tokens, [[_plain(position) for position in output.outputs[0].logprobs or ()] for output in outputs]


def _force(llm: "LLM", prompts: Sequences, tokens: Sequences) -> tuple[Forced, list[list[Logits]]]:
    """Margins, and the logits they come from, of each token after its prompt and the tokens before it."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=NUM_CANDIDATES)
    outputs = _run(llm, [prompt + answer for prompt, answer in zip(prompts, tokens, strict=True)], params)
    logits = [
        [_plain(position) for position in (output.prompt_logprobs or [])[len(prompt) :]]
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
    margins = [
        [max(position.values()) - position[token] for position, token in zip(many, answer, strict=True)]
        for many, answer in zip(logits, tokens, strict=True)
    ]
    return Forced(tokens=tokens, margins=margins), logits


def _run(llm: "LLM", prompts: Sequences, params: object) -> "list[RequestOutput]":
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(inputs, params, use_tqdm=False)  # type: ignore[arg-type]


def _plain(position: "Mapping[int, Logprob] | None") -> Logits:
    assert position is not None
    return {token: entry.logprob for token, entry in position.items()}


def _flat(many: Sequence[Sequence[Logits]]) -> list[Logits]:
    return [logits for sequence in many for logits in sequence]


def main() -> None:
    # vLLM and its libraries may print; the report has standard output for itself.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm import LLM
    from vllm.model_executor.custom_op import op_registry_oot

    # Logits instead of their log-softmax: the last place of a number is asked for.
    llm = LLM(**json.loads(sys.argv[1]), logprobs_mode="raw_logits")
    if op_registry_oot:
        raise RuntimeError(f"this vLLM is not unmodified: {', '.join(op_registry_oot)} was replaced by a plugin")
    json.dump(answer(llm, Job(**json.load(sys.stdin))), out)
    out.close()


if __name__ == "__main__":
    main()
