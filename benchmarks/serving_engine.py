"""A process of bench_serving that holds one vLLM engine, modified or not.

    python -m benchmarks.serving_engine ARGUMENTS

ARGUMENTS: keyword arguments of vLLM's LLM, as JSON. Whether our plugin is active is in the environment.
Each request is {"prompts": [[token ids], ...], "num_tokens": n}; its answer has the fields of a Trace.
"""

import gc
import json
import sys
import time
from typing import TYPE_CHECKING

from benchmarks.serving_child import Request, serve

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine


class Streams:
    """Drives an engine step by step, and notes when each token came."""

    def __init__(self, engine: "LLMEngine") -> None:
        self._engine = engine

    def __call__(self, request: Request) -> dict[str, object]:
        prompts, num_tokens = request["prompts"], request["num_tokens"]
        assert isinstance(prompts, list) and isinstance(num_tokens, int)
        gc.collect()  # not in the middle of what is measured
        return self.run(prompts, num_tokens)

    def run(self, prompts: list[list[int]], num_tokens: int) -> dict[str, object]:
        """Submits all prompts at once and steps until each has its tokens, greedy. Raises RuntimeError if one fails."""
        from vllm import SamplingParams
        from vllm.outputs import RequestOutput
        from vllm.sampling_params import RequestOutputKind

        tokens: list[list[int]] = [[] for _ in prompts]
        times_s: list[list[float]] = [[] for _ in prompts]
        # Each with its new tokens only; detokenising is another process' work when the model is served.
        greedy = SamplingParams(
            temperature=0,
            max_tokens=num_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        begun_s = time.perf_counter()
        for stream, prompt in enumerate(prompts):
            self._engine.add_request(str(stream), {"prompt_token_ids": prompt}, greedy)
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now_s = time.perf_counter()
            for output in outputs:
                assert isinstance(output, RequestOutput)
                [completion] = output.outputs
                if completion.finish_reason not in (None, "length"):
                    raise RuntimeError(f"a stream ended with {completion.finish_reason}: {completion.stop_reason}")
                stream = int(output.request_id)
                tokens[stream] += completion.token_ids
                times_s[stream] += [now_s] * len(completion.token_ids)
        if any(len(found) != num_tokens for found in tokens):
            raise RuntimeError(f"the engine gave {[len(found) for found in tokens]} tokens, and not {num_tokens} each")
        return {"begun_s": begun_s, "times_s": times_s, "tokens": tokens}


def start() -> tuple[object, Streams]:
    """Loads the engine. The first answer: names of vLLM's layers that a plugin replaced."""
    from vllm import LLM
    from vllm.model_executor.custom_op import op_registry_oot

    engine = LLM(**json.loads(sys.argv[1])).llm_engine
    return {"replaced": sorted(op_registry_oot)}, Streams(engine)


if __name__ == "__main__":
    serve(start)
