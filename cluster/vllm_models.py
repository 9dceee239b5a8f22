"""Which classes vLLM finds a checkpoint's model in, found out without a process of its own."""

import json
from pathlib import Path

from vllm.model_executor.models.registry import ModelRegistry, _LazyRegisteredModel
from vllm.platforms import current_platform


def look_at_models_here(checkpoint: str) -> None:
    """Imports the model class that config.json names into this process, and registers it with vLLM.

    vLLM would start a process for that, import itself there, and end it again: 11 to 13 s of CPU, in the gateway and in
    each attention replica. It does so to keep CUDA out of the calling process; so on a GPU nothing is changed.
    """
    if not current_platform.is_cpu():
        return
    for architecture in json.loads((Path(checkpoint) / "config.json").read_text()).get("architectures") or ():
        model = ModelRegistry.models.get(architecture)
        if isinstance(model, _LazyRegisteredModel):
            ModelRegistry.register_model(architecture, model.load_model_cls())
