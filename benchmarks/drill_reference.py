"""Unmodified vLLM that answers the requests of a drill again, as a process: python -m benchmarks.drill_reference ARGS

ARGS are the keyword arguments of vLLM's LLM as JSON. Each request is {"asks": [{"prompt": ids, "sampling": {...}}]},
which are computed in one batch; its answer has {"tokens": ids, "finish": reason} for each.
Nothing of ours that touches vLLM is imported here, and a vLLM that a plugin has changed is refused.
"""

import json
import sys
from collections.abc import Callable

from benchmarks.serving_child import Request, serve


def start() -> tuple[object, Callable[[Request], object]]:
    """Loads the model."""
    from vllm import LLM, SamplingParams
    from vllm.model_executor.custom_op import op_registry_oot

    llm = LLM(**json.loads(sys.argv[1]))
    if op_registry_oot:
        raise RuntimeError(f"this vLLM is not unmodified: {', '.join(op_registry_oot)} was replaced by a plugin")

    def answer(request: Request) -> object:
        asks = request["asks"]
        assert isinstance(asks, list)
        outputs = llm.generate(
            [{"prompt_token_ids": ask["prompt"]} for ask in asks],
            [SamplingParams(**ask["sampling"], detokenize=False) for ask in asks],
            use_tqdm=False,
        )
        choices = [output.outputs[0] for output in outputs]
        return [{"tokens": list(choice.token_ids), "finish": choice.finish_reason} for choice in choices]

    return None, answer


if __name__ == "__main__":
    serve(start)
