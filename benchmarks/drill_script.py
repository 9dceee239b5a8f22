"""The script of a drill on a running cluster: load, fault, full strength, probe, and so on to the end."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from benchmarks.command_line import say
from benchmarks.drill_cluster import View
from benchmarks.drill_faults import apply
from benchmarks.drill_load import Job
from benchmarks.drill_options import Options
from benchmarks.drill_plan import Fault, make_plan
from benchmarks.drill_streams import GRACE_S
from benchmarks.drill_verdict import Window
from benchmarks.progress import Progress, duration
from benchmarks.serving_process import Child, clean_environment, end_all
from experts.errors import ServingError

START_TIMEOUT_S, ANSWER_TIMEOUT_S = 120.0, 30.0
WARM_UP_S = 5.0
POLL_S = 2.0


class Clients:
    """The process of drill_load: a context manager that leaves nothing of it running."""

    def __init__(self, job: Job, folder: Path) -> None:
        self._deadline_s = job.doors.timeout_s + GRACE_S
        self._child = Child(
            "clients",
            "benchmarks.drill_load",
            [json.dumps(asdict(job))],
            environment=clean_environment(),
            log=folder / "clients.log",
        )

    def __enter__(self) -> "Clients":
        return self

    def __exit__(self, *_: object) -> None:
        end_all([self._child])

    def begin(self) -> None:
        """Raises ServingError where the process does not start."""
        self._child.answer(timeout_s=START_TIMEOUT_S)

    def counts(self) -> dict[str, int]:
        """Streams begun, ended and failed. Raises ServingError."""
        return self._ask({"do": "count"}, ANSWER_TIMEOUT_S)  # type: ignore[return-value]

    def probe(self, index: int) -> str | None:
        """Its error. Raises ServingError."""
        return self._ask({"do": "probe", "index": index}, self._deadline_s + ANSWER_TIMEOUT_S)  # type: ignore[return-value]

    def end(self) -> dict[str, int]:
        """Waits for open streams. Raises ServingError."""
        return self._ask({"do": "end"}, self._deadline_s + ANSWER_TIMEOUT_S)  # type: ignore[return-value]

    def _ask(self, request: dict[str, object], timeout_s: float) -> object:
        self._child.tell(request)
        return self._child.answer(timeout_s=timeout_s)


def run_script(view: View, clients: Clients, options: Options, folder: Path) -> tuple[list[Window], list[str]]:
    """The faults that were applied, and why not all of them were, where that is so. Ends the load."""
    windows: list[Window] = []
    problems: list[str] = []
    clients.begin()
    until_s = time.monotonic() + 60 * options.minutes
    try:
        time.sleep(WARM_UP_S)
        _apply_all(view, clients, options, lambda window: _keep(window, windows, folder / "faults.jsonl"))
        _wait(clients, options, until_s)
    except ServingError as error:
        problems.append(str(error))
        say(f"the script ends here: {error}")
    try:
        say("waiting for the open streams")
        clients.end()
    except ServingError as error:
        problems.append(str(error))
    return windows, problems


def _apply_all(view: View, clients: Clients, options: Options, keep: Callable[[Window], None]) -> None:
    """Raises ServingError where one cannot be applied, or the cluster does not get over it."""
    plan = make_plan(options.kinds, times=options.times, seed=options.seed)
    progress = Progress([fault.kind for fault in plan])
    for index, fault in enumerate(plan):
        view.wait_until_whole((), timeout_s=options.whole_timeout_s)
        time.sleep(options.pause_s)
        window = _one(view, fault, options, keep)
        error = clients.probe(index)
        progress.done(fault.kind)
        say(f"{_told(window)}; probe {error or 'answered'}; {_counted(clients.counts())}; faults: {progress}")


def _one(view: View, fault: Fault, options: Options, keep: Callable[[Window], None]) -> Window:
    applied = apply(fault, view, options.lengths)
    whole_s = None
    try:
        view.wait_until_whole(applied.gone, timeout_s=options.whole_timeout_s)
        whole_s = time.monotonic()
    finally:
        window = Window(kind=applied.kind, victim=applied.victim, began_s=applied.began_s, whole_s=whole_s)
        keep(window)
    return window


def _keep(window: Window, windows: list[Window], file: Path) -> None:
    windows.append(window)
    with file.open("a") as out:
        out.write(json.dumps(asdict(window)) + "\n")


def _wait(clients: Clients, options: Options, until_s: float) -> None:
    """Until enough streams have ended, and enough time has passed."""
    while (left_s := until_s - time.monotonic()) > 0 or clients.counts()["ended"] < options.num_streams:
        say(f"all faults applied; {_counted(clients.counts())}; at least {duration(max(left_s, 0))} left")
        time.sleep(min(max(left_s, POLL_S), 30))


def _told(window: Window) -> str:
    assert window.whole_s is not None
    return f"{window.kind} at {window.victim}: full strength after {window.whole_s - window.began_s:.1f} s"


def _counted(counts: dict[str, int]) -> str:
    return f"{counts['ended']} of {counts['begun']} streams ended, {counts['failed']} with an error"
