"""The mark of an answer that was computed without some of its rows, on its way through vLLM.

With `router.capacity_factor` a router leaves out what exceeds a group's budget, and the answer has to say so.
The scheduler knows it and the gateway tells it; between them are vLLM's output processor, a process boundary and Ray.
The mark takes the one field of vLLM's that goes all the way for each choice of a request: `routed_experts`.
vLLM joins its pieces over a request's steps, keeps them until the choice is finished, whoever finds that out (a stop
string is found outside of the engine's process), and does not lose them where outputs are merged or n is above 1.
Nobody else uses it here: cluster/vllm_layer.py refuses an engine that is to return routed experts.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.v1.engine import EngineCoreOutput


def mark(output: "EngineCoreOutput", dropped_rows: int) -> None:
    """Adds to a request's mark: rows dropped in steps of the request since the last output of it that was marked."""
    output.routed_experts = np.array([dropped_rows], dtype=np.int64)


def take_mark(output: "RequestOutput") -> int:
    """Takes the mark off: how many rows were dropped in the steps of the choices that end with this output.

    They are rows of any request in those steps, since a budget is one of a step, and its requests share it.
    A step counts for each choice that was part of it.
    """
    dropped_rows = 0
    for choice in output.outputs:
        if choice.routed_experts is not None:
            dropped_rows += int(choice.routed_experts.sum())
            choice.routed_experts = None  # vLLM's server would show it as what it is not
    return dropped_rows
