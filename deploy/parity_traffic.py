"""The prompts of `expertmesh parity`, and the passes in which a cluster answers them over gRPC."""

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import grpc

from cluster.proto.expertmesh.v1 import inference_pb2 as pb
from cluster.proto.expertmesh.v1 import inference_pb2_grpc as pb_grpc
from deploy.door import Door
from experts.errors import ServingError

MIN_PROMPT, MAX_PROMPT = 8, 64  # tokens
REQUEST_TIMEOUT_S = 600.0
LOAD_START_S = 60.0
Sequences = list[list[int]]  # token ids, [num_prompts][num_tokens]

_TEXT = """The harbour wakes before the town does. At half past four the first lamps are lit along the quay, and the men
who mend the nets come down with their stools and their tea. Nobody speaks much at that hour. A boat that came in with
the tide is unloaded by hand, box after box, each weighed, each written down in pencil: 42 of cod, 17 of plaice, 3 of
something that the clerk does not know. "Write other," says his sister, who keeps the accounts, and he writes other.
By six the baker has opened; by seven the road is full of carts. What does not sell today is salted, and what is salted
is sent inland, to people who have never seen the sea but are particular about their fish. In winter the whole business
takes half as long and earns a third as much. def price(weight, day): return weight * (2.5 if day == "Friday" else 2.1).
The rule is older than the clerk. It was painted on the wall in his grandfather's time, and although the numbers have
been changed more often than the paint, the wall is the only place where everybody looks. When strangers ask how such a
place can last, the answer is always the same: it does not have to last, it only has to open again tomorrow morning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    prompts: Sequences
    num_tokens: int  # of each answer
    vocab_size: int
    max_model_len: int


def make_prompts(checkpoint: Path, count: int, *, vocab_size: int) -> Sequences:
    """Windows of a text, 8 to 64 tokens long, the same in every run; random ids where there is no usable tokenizer."""
    ids = _text_ids(checkpoint, vocab_size) or random.Random(0).choices(range(vocab_size), k=997)  # noqa: S311 - prompts, not secrets
    prompts: Sequences = []
    for index in range(count):
        length = MIN_PROMPT + index * 37 % (MAX_PROMPT - MIN_PROMPT + 1)
        start = index * 53 % max(len(ids) - length, 1)
        prompts.append(ids[start : start + length])
    return prompts


def answers_alone(address: str, question: Question) -> Sequences:
    """Each prompt by itself, one after the other, as unary calls. Raises ServingError where one is not answered."""
    with Door.of_environment().channel(address) as channel:
        stub = pb_grpc.InferenceStub(channel)
        return [_unary(stub, question, index) for index in range(len(question.prompts))]


def answers_under_load(address: str, question: Question, *, num_streams: int) -> Sequences:
    """All prompts at once, as streams, while `num_streams` sampled ones keep every batch busy."""
    count = len(question.prompts)
    with Door.of_environment().channel(address) as channel:
        stub = pb_grpc.InferenceStub(channel)
        with _load(stub, question, num_streams), ThreadPoolExecutor(max_workers=count) as pool:
            return list(pool.map(lambda index: _streamed(stub, question, index), range(count)))


@contextmanager
def _load(stub: pb_grpc.InferenceStub, question: Question, num_streams: int) -> Iterator[None]:
    """Sampled streams, each begun again when it ends, until the block does. Entered once all of them have a token."""
    over = threading.Event()
    begun = threading.Barrier(num_streams + 1)
    streams = [
        threading.Thread(target=_keep_busy, args=(stub, question, index, begun, over), daemon=True)
        for index in range(num_streams)
    ]
    for stream in streams:
        stream.start()
    try:
        begun.wait(LOAD_START_S)
        yield
    except threading.BrokenBarrierError:
        raise ServingError(f"the background streams did not all begin within {LOAD_START_S:.0f} s") from None
    finally:
        over.set()
        begun.abort()
        for stream in streams:
            stream.join(LOAD_START_S)


def _keep_busy(
    stub: pb_grpc.InferenceStub, question: Question, index: int, begun: threading.Barrier, over: threading.Event
) -> None:
    ids = random.Random(index)  # noqa: S311 - prompts, not secrets
    waiting = True
    while not over.is_set():
        prompt = ids.choices(range(question.vocab_size), k=ids.randint(MIN_PROMPT, MAX_PROMPT))
        call = stub.GenerateStream(
            pb.GenerateRequest(
                prompt_token_ids=pb.TokenIds(ids=prompt),
                max_tokens=question.max_model_len - len(prompt),
                temperature=1.0,
                seed=ids.getrandbits(31),
                ignore_eos=True,
            ),
            timeout=REQUEST_TIMEOUT_S,
        )
        try:
            for _ in call:
                if waiting:
                    begun.wait(LOAD_START_S)
                    waiting = False
                if over.is_set():
                    call.cancel()
        except grpc.RpcError:
            over.wait(0.2)  # a stream of the load may fail; what is judged are the others
        except threading.BrokenBarrierError:
            call.cancel()
            return


def _unary(stub: pb_grpc.InferenceStub, question: Question, index: int) -> list[int]:
    try:
        return list(stub.Generate(_request(question, index), timeout=REQUEST_TIMEOUT_S).token_ids)
    except grpc.RpcError as error:
        raise _unanswered(error, index) from None


def _streamed(stub: pb_grpc.InferenceStub, question: Question, index: int) -> list[int]:
    try:
        chunks = stub.GenerateStream(_request(question, index), timeout=REQUEST_TIMEOUT_S)
        return [token for chunk in chunks for token in chunk.token_ids]
    except grpc.RpcError as error:
        raise _unanswered(error, index) from None


def _request(question: Question, index: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        prompt_token_ids=pb.TokenIds(ids=question.prompts[index]),
        max_tokens=question.num_tokens,
        temperature=0.0,
        ignore_eos=True,
    )


def _unanswered(error: grpc.RpcError, index: int) -> ServingError:
    call = cast("grpc.Call", error)
    return ServingError(f"the cluster did not answer prompt {index}: {call.code().name}: {call.details()}")


def _text_ids(checkpoint: Path, vocab_size: int) -> list[int] | None:
    from tokenizers import Tokenizer

    try:
        ids = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(_TEXT, add_special_tokens=False).ids
    except Exception:  # the library raises nothing narrower, for a missing file and for a broken one
        return None
    return ids if len(ids) > MAX_PROMPT and max(ids) < vocab_size else None
