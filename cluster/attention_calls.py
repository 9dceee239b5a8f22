"""Calls of a gateway to the attention replicas, by Serve's handle: who answers is Serve's choice."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, cast

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from cluster.continuation import ReplicaLost
from cluster.gateway_errors import Overloaded
from cluster.output_inbox import Inbox, Mailbox
from experts.errors import GroupUnavailable

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams

    # As Attention.generate yields them.
    Answers = DeploymentResponseGenerator[bytes | RequestOutput | tuple[int, RequestOutput] | int]

log = logging.getLogger(__name__)

ASSIGN_S = 0.5  # for which a call that nobody waits for any more may go on looking for a replica
AGAIN_S = 0.2  # until a cancelled call is cancelled again
GIVE_UP_S = 30.0


class HandleEngine:
    """The attention deployment as an engine (`gateway_run.Engine`)."""

    def __init__(self, attention: DeploymentHandle, inbox: Inbox | None = None) -> None:
        """inbox: where replicas send outputs, those that can reach it. Without one all of them come by Ray."""
        self._attention = attention.options(stream=True)
        self._inbox = inbox
        self._tasks: set[asyncio.Task[None]] = set()

    async def generate(
        self, prompt: Mapping[str, object], params: "SamplingParams", request_id: str
    ) -> AsyncGenerator["RequestOutput", None]:
        """Streams from one attention replica; leaving early cancels the call, so that its engine aborts."""
        from cluster.output_wire import unpack

        prompt_token_ids = cast("list[int]", prompt["prompt_token_ids"])
        with nullcontext((0, Mailbox())) if self._inbox is None else self._inbox.mailbox() as (number, box):
            reply_to = None if self._inbox is None else (self._inbox.address, number)
            call = self._attention.generate.remote(dict(prompt), params, request_id, reply_to)
            answers = cast("Answers", call)
            following = self._start(_follow(answers, box))
            finished = False
            try:
                while (packed := await box.next()) is not None:
                    output = unpack(packed, request_id=request_id, prompt_token_ids=prompt_token_ids)
                    finished = output.finished
                    yield output
            finally:
                if not finished and not following.done():
                    self._start(_leave(answers, following))

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def unwrapped(exc: Exception) -> Exception:
    """What a call to another deployment failed of: its own error, or ours for what Ray and Serve report."""
    while isinstance(exc, RayTaskError) and isinstance(exc.cause, Exception):
        exc = exc.cause
    if isinstance(exc, BackPressureError):
        return Overloaded("all attention replicas are busy and their queues are full; try again")
    if isinstance(exc, RayActorError | ReplicaUnavailableError | ObjectLostError):
        return ReplicaLost("the attention replica that had this request is gone; try again")
    if isinstance(exc, DeploymentUnavailableError):
        return GroupUnavailable("no attention replica could be started; try again")
    return exc


async def _follow(answers: "Answers", box: Mailbox) -> None:
    """Puts what comes by Ray into the mailbox: outputs that did not go by a link, their number, and errors."""
    place = 0
    num_outputs: int | None = None
    try:
        async for answer in answers:
            if isinstance(answer, int):
                num_outputs = answer
            elif isinstance(answer, tuple):
                box.put(*answer)
            else:
                box.put(place, answer)
                place += 1
        box.end(place if num_outputs is None else num_outputs)
    except asyncio.CancelledError:
        box.fail(ReplicaLost("the call to the attention replica was cancelled; try again"))  # nobody waits for ever
        raise
    except Exception as exc:
        box.fail(unwrapped(exc))


async def _leave(answers: "Answers", following: asyncio.Task[None]) -> None:
    """Cancels a call until it has ended, which ends who follows it.

    Once is not enough: of the cancellations that overtake their calls on the way to the replica, Ray heeds some after
    two seconds and some never. So the call is with its replica first, and is cancelled again while it goes on.
    """
    with_replica = asyncio.ensure_future(_reference(answers))
    await asyncio.wait({with_replica}, timeout=ASSIGN_S)
    answers.cancel()
    until_s = time.monotonic() + GIVE_UP_S
    while not (await asyncio.wait({following}, timeout=AGAIN_S))[0]:
        if time.monotonic() > until_s:
            following.cancel()
            log.warning("a call to an attention replica goes on although it was cancelled", extra={"for_s": GIVE_UP_S})
        elif with_replica.done() and not with_replica.cancelled() and (call := with_replica.result()) is not None:
            ray.cancel(call)


async def _reference(answers: "Answers") -> ray.ObjectRefGenerator | None:
    """Of the call, once it is with a replica; None where it has failed."""
    with suppress(Exception):
        return await answers._to_object_ref_gen()
    return None
