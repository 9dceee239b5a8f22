"""An engine whose requests outlive the replicas under them: who is lost is replaced by another one, for a while."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from cluster.continuation import NotContinued, ReplicaLost, Told
from cluster.gateway_errors import Overloaded
from cluster.gateway_run import Engine
from cluster.request_log import tell

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long one request is carried on; its own deadline ends it anyway."""

    max_losses: int = 8  # of replicas, each after it had given a sign of life
    wait_s: float = 60.0  # from a loss to the next output of a stream; a replica that replaces the only one starts up
    longest_pause_s: float = (
        1.0  # between two attempts: Serve may send them to a replica that is about to be found dead
    )


class ContinuingEngine:
    """An engine (`gateway_run.Engine`) round another one, whose lost requests it gives to it again.

    A stream goes on behind its last token (cluster/continuation.py); what has told nothing yet simply begins again.
    `continued` counts losses after which a request went on, `given_up` requests that ended because of one.
    """

    def __init__(self, engine: Engine, *, patience: Patience | None = None, drops_rows: bool = False) -> None:
        self._engine = engine
        self._patience = patience or Patience()
        self._drops_rows = drops_rows
        self.continued = 0
        self.given_up = 0

    async def generate(
        self, prompt: Mapping[str, object], params: "SamplingParams", request_id: str
    ) -> AsyncGenerator["RequestOutput", None]:
        """Raises ReplicaLost when patience is over, NotContinued, and what the engine raises otherwise."""
        told = Told(params, drops_rows=self._drops_rows)
        outage: _Outage | None = None
        losses = 0
        for attempt in count():
            engine_id = f"{request_id}.{attempt}" if attempt else request_id
            if attempt:
                tell("attention.asked_again", attempt=attempt, tokens=told.num_tokens)
            outputs = self._engine.generate(prompt, told.begin(), engine_id)
            try:
                while (output := await _next(outputs, outage, params)) is not None:
                    if outage is not None:
                        self.continued += 1
                        log.info("request goes on", extra={"request": engine_id, "tokens": told.num_tokens})
                        tell("attention.continued", attempt=attempt, tokens=told.num_tokens)
                        outage = None
                    output.request_id = request_id
                    if (new := told.new_in(output)) is not None:
                        yield new
                return
            except (ReplicaLost, Overloaded) as error:
                if outage is None:
                    if isinstance(error, Overloaded):
                        raise
                    losses += 1
                    outage = _Outage(self._patience)
                    log.warning("attention replica lost", extra={"request": engine_id, "tokens": told.num_tokens})
                    tell("attention.lost", attempt=attempt, tokens=told.num_tokens)
                if losses > self._patience.max_losses or not await outage.pause():
                    self.given_up += 1
                    raise
            except NotContinued:
                self.given_up += 1
                raise
            finally:
                await outputs.aclose()


class _Outage:
    """From a loss to the next sign of life."""

    def __init__(self, patience: Patience) -> None:
        self.over_at = asyncio.get_running_loop().time() + patience.wait_s
        self._longest_pause_s = patience.longest_pause_s
        self._pause_s = 0.0  # Serve passes over an actor once a call to it has failed, so the next one is right at once

    async def pause(self) -> bool:
        """Waits before the next attempt, longer each time; False, at once, where there is no time for one."""
        pause_s, self._pause_s = self._pause_s, min(max(2 * self._pause_s, 0.05), self._longest_pause_s)
        if asyncio.get_running_loop().time() + pause_s >= self.over_at:
            return False
        await asyncio.sleep(pause_s)
        return True


async def _next(
    outputs: AsyncGenerator["RequestOutput", None], outage: _Outage | None, params: "SamplingParams"
) -> "RequestOutput | None":
    """The engine's next output, None at its end. Raises ReplicaLost for one that shows the loss, or does not come."""
    # An engine that is to answer in one piece is silent until then.
    is_stream = params.output_kind.name != "FINAL_ONLY"
    timeout = asyncio.timeout_at(outage.over_at if outage is not None and is_stream else None)
    try:
        async with timeout:
            output = await anext(outputs, None)
    except TimeoutError:
        if not timeout.expired():
            raise
        raise ReplicaLost("no attention replica went on with this request in time; try again") from None
    if output is not None and any(choice.finish_reason == "abort" for choice in output.outputs):
        # Who wanted the request aborted would not be listening: its engine was shut down.
        raise ReplicaLost("the attention replica that had this request was shut down; try again")
    return output
