"""A gateway's calls to attention replicas: outputs by links and by Ray, errors, and clients that leave."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest
from inbox_fakes import links_of, open_inbox
from ray.serve.handle import DeploymentHandle
from traces_fakes import Replica, Vllm
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from cluster import attention_calls
from cluster.attention_calls import HandleEngine
from cluster.continuation import ReplicaLost
from cluster.drop_mark import take_mark
from cluster.output_inbox import Inbox

PARAMS = SamplingParams(output_kind=RequestOutputKind.DELTA)


class Call:
    """What Serve's handle returns for a streaming call, over a generator in this process."""

    def __init__(self, answers: AsyncIterator[object], *, deaf_to: int) -> None:
        self._answers = answers
        self._deaf_to = deaf_to
        self._is_cancelled = asyncio.Event()
        self.taken: list[object] = []

    def __aiter__(self) -> "Call":
        return self

    async def __anext__(self) -> object:
        answer = asyncio.ensure_future(anext(self._answers))
        cancelled = asyncio.ensure_future(self._is_cancelled.wait())
        await asyncio.wait({answer, cancelled}, return_when=asyncio.FIRST_COMPLETED)
        cancelled.cancel()
        if not answer.done():
            answer.cancel()
            raise RuntimeError("cancelled")
        self.taken.append(answer.result())
        return self.taken[-1]

    def cancel(self) -> None:
        self._deaf_to -= 1
        if self._deaf_to < 0:
            self._is_cancelled.set()

    async def _to_object_ref_gen(self) -> "Call":
        return self


class Attentions:
    """Serve's handle, with one replica behind it."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.deaf_to = 0  # cancellations
        self.calls: list[Call] = []
        self.generate = self

    def options(self, *, stream: bool) -> "Attentions":
        assert stream
        return self

    def remote(self, *arguments: object) -> Call:
        self.calls.append(Call(self.replica.generate(*arguments), deaf_to=self.deaf_to))  # type: ignore[arg-type]
        return self.calls[-1]


@pytest.fixture
def vllm() -> Vllm:
    return Vllm()


@pytest.fixture
async def inbox(tmp_path: Path) -> AsyncIterator[Inbox]:
    async with open_inbox(tmp_path) as inbox:
        yield inbox


@pytest.fixture
async def attentions(vllm: Vllm, inbox: Inbox, tmp_path: Path) -> AsyncIterator[Attentions]:
    replica = Replica(vllm)
    replica._links = links_of(tmp_path)
    yield Attentions(replica)
    replica._links.close()


def engine(attentions: Attentions, inbox: Inbox | None) -> HandleEngine:
    return HandleEngine(cast("DeploymentHandle", attentions), inbox)


async def texts(engine: HandleEngine, *, told: list[str] | None = None) -> list[str]:
    told = [] if told is None else told
    async for output in engine.generate({"prompt_token_ids": [1, 2]}, PARAMS, "r"):
        told.append(output.outputs[0].text)
    return told


async def test_outputs_come_by_the_link_and_only_their_number_by_ray(attentions: Attentions, inbox: Inbox) -> None:
    assert await texts(engine(attentions, inbox)) == ["a", "b", "c"]
    await settled()
    assert attentions.calls[0].taken == [3]


async def test_without_an_inbox_they_come_by_ray(attentions: Attentions) -> None:
    assert await texts(engine(attentions, None)) == ["a", "b", "c"]
    await settled()
    assert all(isinstance(answer, bytes) for answer in attentions.calls[0].taken)


async def test_an_inbox_out_of_reach_is_none(attentions: Attentions, inbox: Inbox) -> None:
    inbox.address = "unix:/nowhere/g.sock"
    assert await texts(engine(attentions, inbox)) == ["a", "b", "c"]
    inbox.address = ""


async def test_what_bytes_cannot_say_comes_by_ray_in_its_place(
    attentions: Attentions, inbox: Inbox, vllm: Vllm
) -> None:
    vllm.dropped_rows = [7]  # a mark on the last output
    outputs = [o async for o in engine(attentions, inbox).generate({"prompt_token_ids": [1]}, PARAMS, "r")]
    assert [output.outputs[0].text for output in outputs] == ["a", "b", "c"]
    assert take_mark(outputs[-1]) == 7
    await settled()
    place, slow = cast("tuple[int, RequestOutput]", attentions.calls[0].taken[0])
    assert (place, attentions.calls[0].taken[1:]) == (2, [3]) and slow is outputs[-1]


@pytest.mark.parametrize("with_inbox", [True, False])
async def test_an_error_comes_behind_the_outputs_before_it(
    attentions: Attentions, inbox: Inbox, vllm: Vllm, with_inbox: bool
) -> None:
    vllm.lives = [2]
    told: list[str] = []
    with pytest.raises(ReplicaLost, match="engine died"):
        await texts(engine(attentions, inbox if with_inbox else None), told=told)
    assert told == ["a", "b"]


async def test_a_link_that_breaks_loses_the_requests_on_it(attentions: Attentions, inbox: Inbox, vllm: Vllm) -> None:
    vllm.delay_s = 0.1
    reading = asyncio.create_task(texts(engine(attentions, inbox)))
    await asyncio.sleep(0.15)
    for link in list(inbox._links):
        link.hang_up()
    with pytest.raises(ReplicaLost, match="link"):
        await reading
    vllm.delay_s = 0.0
    assert await texts(engine(attentions, inbox)) == ["a", "b", "c"]


@pytest.mark.parametrize("deaf_to", [0, 1])
async def test_who_leaves_cancels_the_call_until_it_has_ended(
    attentions: Attentions, inbox: Inbox, vllm: Vllm, monkeypatch: pytest.MonkeyPatch, deaf_to: int
) -> None:
    monkeypatch.setattr(attention_calls, "AGAIN_S", 0.05)
    monkeypatch.setattr(attention_calls.ray, "cancel", lambda call: call.cancel())
    vllm.words, vllm.delay_s, attentions.deaf_to = ["a"] * 500, 0.01, deaf_to
    outputs = engine(attentions, inbox).generate({"prompt_token_ids": [1]}, PARAMS, "r")
    await anext(outputs)
    await outputs.aclose()
    await settled()
    assert vllm.aborted == 1
    assert not inbox._mailboxes


async def test_a_call_that_is_cancelled_under_its_reader_is_an_error(
    attentions: Attentions, inbox: Inbox, vllm: Vllm
) -> None:
    vllm.delay_s = 30.0
    handle = engine(attentions, inbox)
    reading = asyncio.create_task(texts(handle))
    await asyncio.sleep(0.05)
    (following,) = handle._tasks
    following.cancel()
    with pytest.raises(ReplicaLost, match="cancelled"):
        await reading


async def settled() -> None:
    """Returns when no task but the test's own goes on."""
    async with asyncio.timeout(5):
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)
