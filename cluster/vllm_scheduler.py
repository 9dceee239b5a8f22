"""vLLM's scheduler, which additionally ends the requests of a poisoned step with their reason."""

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus

from cluster.step import CURRENT


class PoisonAwareScheduler(Scheduler):
    """Given to vLLM as `scheduler_cls`; the worker must live in the same process (executor `uni`)."""

    _step_blocks: frozenset[int] = frozenset()  # KV blocks of the step's requests; only kept for a prefix cache

    def schedule(self, *args, **kwargs) -> SchedulerOutput:
        CURRENT.begin()
        output = super().schedule(*args, **kwargs)
        if self.kv_cache_manager.enable_caching:
            # Noted now: a request that is aborted during the step has lost its blocks when the step ends.
            self._step_blocks = self._blocks_of(output)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        reason = CURRENT.take()
        ended = self._end(scheduler_output, reason) if reason is not None else []
        # vLLM passes over requests that are finished, so no token of an ended one is taken.
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for client_index, output in ended:
            outputs.setdefault(client_index, EngineCoreOutputs()).outputs.append(output)
        return outputs

    def _end(self, scheduler_output: SchedulerOutput, reason: str) -> list[tuple[int, EngineCoreOutput]]:
        request_ids = [r for r in scheduler_output.num_scheduled_tokens if r in self.requests]
        ended = self.finish_requests(request_ids, RequestStatus.FINISHED_ERROR)
        if self.kv_cache_manager.enable_caching:
            # Their KV was computed from zeros: a prefix cache must never find it again.
            self.kv_cache_manager.evict_blocks(set(self._step_blocks))
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

    def _blocks_of(self, output: SchedulerOutput) -> frozenset[int]:
        of_request = map(self.kv_cache_manager.get_block_ids, output.num_scheduled_tokens)
        return frozenset(block for groups in of_request for group in groups for block in group)
