"""The outer side of a process of bench_serving: starts it, asks it, ends it, and looks at its memory and time."""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.serving_child import ANSWERS_VARIABLE
from experts.errors import ServingError

ROOT = Path(__file__).parents[1]
END_TIMEOUT_S = 10.0
# What we start is a process group, since Ctrl-C is for us and we end it, but no session: a kernel with
# sched_autogroup_enabled shares the cores out by session, and with a busy cluster in one session it let the clients in
# another wait for seconds. What was measured then was the clients.
OWN_GROUP = 0  # for subprocess.Popen(process_group=...)
IDLE_CORES, IDLE_TIMEOUT_S = 0.1, 5.0
_SHOWN_LINES = 12  # of a log, where its process fails
_OURS = ("EXPERTMESH_", "VLLM_", "RAY_", "OMP_", "GOMP_", "KMP_", "LD_PRELOAD")


class ChildError(ServingError):
    """A process of the benchmark failed; the text has its last words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMemory:
    """Of one process of the operating system."""

    name: str
    pss_bytes: int  # pages that n processes share count 1/n in each
    rss_bytes: int


class Child:
    """One process, and those it starts. Ends at the latest when this process does."""

    def __init__(
        self, name: str, module: str, arguments: Sequence[str], *, environment: Mapping[str, str], log: Path
    ) -> None:
        self.name = name
        self._log = log
        reading, writing = os.pipe()
        self._answers = os.fdopen(reading)
        try:
            with log.open("w") as out:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", module, *arguments],
                    cwd=ROOT,
                    env={**environment, ANSWERS_VARIABLE: str(writing)},
                    stdin=subprocess.PIPE,
                    stdout=out,
                    stderr=out,
                    text=True,
                    pass_fds=[writing],
                    process_group=OWN_GROUP,
                )
        finally:
            os.close(writing)  # theirs alone, so that their end is the end of the answers

    def tell(self, request: Mapping[str, object]) -> None:
        """Sends a request; `answer` must follow."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ChildError(self._last_words("has ended")) from None

    def answer(self, *, timeout_s: float) -> object:
        """The result of the start, or of the last request. Raises ChildError where it failed or takes too long."""
        # Nothing is buffered on our side: a process says one line, and waits.
        if not select.select([self._answers], [], [], timeout_s)[0]:
            raise ChildError(self._last_words(f"did not answer within {timeout_s:.0f} s"))
        line = self._answers.readline()
        if not line:
            raise ChildError(self._last_words("has ended"))
        reply = json.loads(line)
        if "error" in reply:
            raise ChildError(self._last_words(f"failed with {reply['error']}"))
        return reply["result"]

    @property
    def family(self) -> list[psutil.Process]:
        """The process and its descendants that are alive, itself first."""
        try:
            own = psutil.Process(self._process.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def memory(self) -> list[ProcessMemory]:
        """Of the family; descendants are numbered from 1."""
        found = []
        for index, process in enumerate(self.family):
            try:
                info = process.memory_full_info()
            except psutil.Error:  # one that was just ending
                continue
            name = f"{self.name} child {index}" if index else self.name
            found.append(ProcessMemory(name=name, pss_bytes=info.pss, rss_bytes=info.rss))
        return found

    def release(self) -> list[psutil.Process]:
        """Asks it to end, by closing its input, and does not wait: those that are to be seen off, see end_all."""
        family = self.family
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # ended already
        return family

    def reap(self) -> None:
        """After end_all."""
        self._answers.close()
        self._process.wait(END_TIMEOUT_S)

    def _last_words(self, what: str) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()[-_SHOWN_LINES:]
        said = "\n".join(f"    {line}" for line in lines) or "    nothing"
        return f"the process {self.name} {what}; it said at last:\n{said}"


def end_all(children: Sequence[Child]) -> None:
    """Ends them and everything that they have started; kills what does not end by itself."""
    family = [process for child in children for process in child.release()]
    _, alive = psutil.wait_procs(family, timeout=END_TIMEOUT_S)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass
    for child in children:
        child.reap()


def cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    """Processor time that they have used together since they began."""
    total = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def wait_until_idle(processes: Sequence[psutil.Process]) -> None:
    """Until they use hardly any processor time, or some seconds have passed.

    vLLM's workers spin for a second after their last step, for which the next setup must not pay.
    """
    deadline_s = time.monotonic() + IDLE_TIMEOUT_S
    while processes and time.monotonic() < deadline_s:
        before_s, started_s = cpu_seconds(processes), time.monotonic()
        time.sleep(0.2)
        if cpu_seconds(processes) - before_s <= IDLE_CORES * (time.monotonic() - started_s):
            return


def clean_environment() -> dict[str, str]:
    """Ours without what would change how vLLM, Ray or OpenMP behave."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
    return kept | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
