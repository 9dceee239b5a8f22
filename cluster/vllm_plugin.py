"""The entry point that vLLM calls in each of its processes (group `vllm.general_plugins`).

It does nothing unless an attention replica asks for it in the environment, so that an ordinary vLLM in the same
Python environment stays ordinary. Nothing risky is imported at module level: vLLM only logs a plugin that fails to
import, and would go on without it.
"""

import os

ACTIVATION_VARIABLE = "EXPERTMESH_ATTENTION"
LOAD_FORMAT = "remote_experts"


def register() -> None:
    """Replaces vLLM's routed experts by remote ones, after checking everything that this relies on.

    Raises RuntimeError, which stops the process, where vLLM is not what we know.
    """
    if os.environ.get(ACTIVATION_VARIABLE) != "1":
        return
    from cluster.vllm_checks import check_vllm

    check_vllm()
    from cluster import vllm_layer

    vllm_layer.register()
