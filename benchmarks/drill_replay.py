"""Asks an unmodified vLLM process what a drill asked its cluster, in batches and one by one."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.command_line import say
from benchmarks.drill_history import Expected
from benchmarks.drill_requests import Ask
from benchmarks.progress import Progress
from benchmarks.serving_process import Child, clean_environment, end_all
from deploy.config import Resolved

START_TIMEOUT_S, BATCH_TIMEOUT_S = 600.0, 1800.0
KV_CACHE_MIB = 256


class Reference:
    """A running vLLM process."""

    def __init__(self, child: Child) -> None:
        self._child = child

    def answer(self, asks: Sequence[Ask]) -> list[Expected]:
        """All in one batch. Raises ServingError."""
        plain = [{"prompt": list(ask.prompt), "sampling": dict(ask.sampling)} for ask in asks]
        self._child.tell({"asks": plain})
        answers = self._child.answer(timeout_s=BATCH_TIMEOUT_S)
        assert isinstance(answers, list)
        return [Expected(**answer) for answer in answers]

    def answer_all(self, asks: Sequence[Ask], *, batch: int) -> list[Expected]:
        """In batches of `batch`, with progress. Raises ServingError."""
        found: list[Expected] = []
        progress = Progress(["batch"] * -(-len(asks) // batch))
        for first in range(0, len(asks), batch):
            found += self.answer(asks[first : first + batch])
            progress.done("batch")
            say(f"vLLM has answered {len(found)} of {len(asks)} requests; batches: {progress}")
        return found


@contextmanager
def started_reference(resolved: Resolved, *, max_num_seqs: int) -> Iterator[Reference]:
    """Loads the checkpoint of a cluster, whole; nothing is left of the process. Raises ServingError."""
    with tempfile.TemporaryDirectory(prefix="em-") as folder:
        arguments = json.dumps(_engine_arguments(resolved) | {"max_num_seqs": max_num_seqs})
        child = Child(
            "reference",
            "benchmarks.drill_reference",
            [arguments],
            environment=_environment(folder, threads=resolved.config.attention.threads),
            log=Path(folder) / "reference.log",
        )
        try:
            child.answer(timeout_s=START_TIMEOUT_S)
            yield Reference(child)
        finally:
            end_all([child])


def _environment(folder: str, *, threads: int) -> dict[str, str]:
    return clean_environment() | {
        "VLLM_PLUGINS": "",  # an allow-list: no plugin, ours included
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": f"{folder}/vllm",
        "VLLM_CONFIG_ROOT": f"{folder}/vllm",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),  # as the cluster's engines have it
    }


def _engine_arguments(resolved: Resolved) -> dict[str, object]:
    # Imported here: Ray comes with them, which takes seconds.
    from cluster.attention import plain_engine_arguments
    from experts.served_model import ServedModel

    model = ServedModel(
        checkpoint=str(resolved.checkpoint.path),
        dtype=resolved.dtype,
        num_groups=1,
        max_rows=resolved.max_rows,
        runtime_dir="",
    )
    return plain_engine_arguments(model, max_model_len=resolved.config.model.max_model_len, kv_cache_mib=KV_CACHE_MIB)
