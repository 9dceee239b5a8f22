"""vLLM's scheduler, which additionally ends the requests of a poisoned step, and marks those of one that lacks rows."""

from collections.abc import Iterable, Mapping

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus

from cluster.drop_mark import mark
from cluster.metrics import ENGINE
from cluster.step import CURRENT
from cluster.vllm_resume import ResumingScheduler


class PoisonAwareScheduler(ResumingScheduler):
    """Given to vLLM as `scheduler_cls`; the worker must live in the same process (executor `uni`)."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        # By request id: KV blocks of the step's requests; only kept for a prefix cache.
        self._step_blocks: Mapping[str, frozenset[int]] = {}
        # By request id: rows dropped in its steps and not reported yet; of every request that ever had any.
        self._dropped_rows: dict[str, int] = {}
        ENGINE.requests = lambda: (len(self.running), len(self.waiting))
        ENGINE.kv_blocks = self._count_blocks

    def schedule(self, *args, **kwargs) -> SchedulerOutput:
        CURRENT.begin()
        ENGINE.begin_step()
        output = super().schedule(*args, **kwargs)
        if self.kv_cache_manager.enable_caching:
            # Noted now: a request that is aborted during the step has lost its blocks when the step ends.
            self._step_blocks = {r: self._blocks_of(r) for r in output.num_scheduled_tokens}
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        if CURRENT.dropped_rows:
            # All requests of the step share its budgets, so the answer of each may be another than it would have been.
            for request_id in scheduler_output.num_scheduled_tokens:
                self._dropped_rows[request_id] = self._dropped_rows.get(request_id, 0) + CURRENT.dropped_rows
        reason = CURRENT.take()
        ended = self._end(scheduler_output, reason) if reason is not None else []
        # vLLM passes over requests that are finished, so no token of an ended one is taken.
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self._dropped_rows:
            self._mark(outputs)
        for client_index, output in ended:
            outputs.setdefault(client_index, EngineCoreOutputs()).outputs.append(output)
        ENGINE.end_step(scheduler_output.total_num_scheduled_tokens, poisoned=reason is not None)
        return outputs

    def _end(self, scheduler_output: SchedulerOutput, reason: str) -> list[tuple[int, EngineCoreOutput]]:
        request_ids = [r for r in scheduler_output.num_scheduled_tokens if r in self.requests]
        ended = self.finish_requests(request_ids, RequestStatus.FINISHED_ERROR)
        # Their KV was computed from zeros: a prefix cache must never find it again.
        self._evict(self._step_blocks)
        return [
            (
                request.client_index,
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    stop_reason=reason,
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                ),
            )
            for request in ended
        ]

    def _mark(self, outputs: Mapping[int, EngineCoreOutputs]) -> None:
        """Reports dropped rows with the outputs that there are; who is marked stays so until it is finished."""
        # What a marked request computes is built on what it lacks: no other request may find it in a prefix cache.
        self._evict(self._dropped_rows.keys() & self._step_blocks.keys())
        for of_client in outputs.values():
            for output in of_client.outputs:
                dropped_rows = self._dropped_rows.get(output.request_id, 0)
                if dropped_rows:
                    mark(output, dropped_rows)
                    self._dropped_rows[output.request_id] = 0
        self._dropped_rows = {r: rows for r, rows in self._dropped_rows.items() if r in self.requests}

    def _evict(self, request_ids: Iterable[str]) -> None:
        """Takes the step's blocks of these requests out of the prefix cache, if there is one."""
        if self.kv_cache_manager.enable_caching:
            self.kv_cache_manager.evict_blocks({block for r in request_ids for block in self._step_blocks[r]})

    def _count_blocks(self) -> tuple[int, int]:
        """Used, free; asked for by the thread that collects metrics."""
        pool = self.kv_cache_manager.block_pool
        free = pool.get_num_free_blocks()
        return pool.num_gpu_blocks - 1 - free, free  # one block is never given out

    def _blocks_of(self, request_id: str) -> frozenset[int]:
        return frozenset(block for group in self.kv_cache_manager.get_block_ids(request_id) for block in group)
