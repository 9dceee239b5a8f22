"""The clients of a drill, as one process: so many streams at a time until they are told to end, all recorded.

    python -m benchmarks.drill_load JOB

JOB is JSON with the fields of Job. Each request is one of
{"do": "count"}: how many streams have begun, ended and failed;
{"do": "probe", "index": i}: runs one more, and answers with its error or null;
{"do": "end"}: begins no more, waits for those that are open, and answers with the counts.
"""

import asyncio
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc.aio

from benchmarks.drill_history import End, Recorder
from benchmarks.drill_requests import Ask, Mix, make_ask, make_probe
from benchmarks.drill_streams import Doors, run_stream
from benchmarks.serving_child import Request, serve
from cluster.proto.expertmesh.v1 import inference_pb2_grpc as pb_grpc

PAUSE_S = 1.0  # after an error, as a client that heeds Retry-After


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the process is to do."""

    history: str  # file
    concurrency: int  # streams at a time
    doors: Doors
    mix: Mix

    @staticmethod
    def from_json(text: str) -> "Job":
        found = json.loads(text)
        mix = found["mix"]
        return Job(
            history=found["history"],
            concurrency=found["concurrency"],
            doors=Doors(**found["doors"]),
            mix=Mix(seed=mix["seed"], prompts=mix["prompts"], num_tokens=tuple(mix["num_tokens"])),
        )


class Load:
    """The streams, on an event loop of their own."""

    def __init__(self, job: Job, recorder: Recorder) -> None:
        self._job = job
        self._recorder = recorder
        self._over = False
        self._next = 0
        self.counts: Counter[str] = Counter(begun=0, ended=0, failed=0)

    async def run(self, stub: pb_grpc.InferenceStub) -> None:
        """Until `end`, and then until the last stream has ended."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._job.concurrency):
                tasks.create_task(self._keep_asking(stub))

    def end(self) -> None:
        self._over = True

    async def probe(self, stub: pb_grpc.InferenceStub, index: int) -> str | None:
        """Runs a probe; its error."""
        end = await self._ask(stub, make_probe(self._job.mix, index))
        return None if end.error is None else f"{end.error}: {end.detail}"

    async def _keep_asking(self, stub: pb_grpc.InferenceStub) -> None:
        while not self._over:
            index, self._next = self._next, self._next + 1
            end = await self._ask(stub, make_ask(self._job.mix, index))
            if end.error is not None:
                await asyncio.sleep(PAUSE_S)

    async def _ask(self, stub: pb_grpc.InferenceStub, ask: Ask) -> End:
        recorder = self._recorder
        recorder.begun(ask, at_s=time.monotonic())
        self.counts["begun"] += 1
        end = await run_stream(self._job.doors, stub, ask, lambda ids: recorder.tokens(ask, ids, at_s=time.monotonic()))
        recorder.ended(ask, end, at_s=time.monotonic())
        self.counts["ended"] += 1
        self.counts["failed"] += end.error is not None
        return end


class LoadThread(threading.Thread):
    """Runs a Load; its requests come from the main thread."""

    def __init__(self, job: Job) -> None:
        super().__init__(name="load", daemon=True)
        self._job = job
        self._ready = threading.Event()

    def run(self) -> None:
        asyncio.run(self._main())

    def handle(self, request: Request) -> object:
        """Raises ValueError for a request that is none."""
        self._ready.wait()
        if request["do"] == "probe":
            index = int(str(request["index"]))
            return asyncio.run_coroutine_threadsafe(self._load.probe(self._stub, index), self._loop).result()
        if request["do"] == "end":
            self._load.end()
            self.join()
        elif request["do"] != "count":
            raise ValueError(f"unknown request {request['do']!r}")
        return dict(self._load.counts)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        with Recorder(Path(self._job.history)) as recorder:
            async with grpc.aio.insecure_channel(self._job.doors.grpc) as channel:
                self._load, self._stub = Load(self._job, recorder), pb_grpc.InferenceStub(channel)
                self._ready.set()
                await self._load.run(self._stub)


def start() -> tuple[object, Callable[[Request], object]]:
    """Begins to load at once."""
    load = LoadThread(Job.from_json(sys.argv[1]))
    load.start()
    return None, load.handle


if __name__ == "__main__":
    serve(start)
