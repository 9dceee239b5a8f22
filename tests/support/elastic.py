"""A running cluster's expert groups under requests: what tests give it, and what they wait for."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml
from ray_cluster import Cluster


@contextmanager
def requests(ask: Callable[[], list[int]], expected: list[int], *, streams: int) -> Iterator[None]:
    """`streams` requests at a time, again and again; every answer must be the expected one."""
    stopped = threading.Event()
    answers: list[list[int] | Exception] = []

    def run() -> None:
        while not stopped.is_set():
            try:
                answers.append(ask())
            except Exception as error:
                answers.append(error)

    threads = [threading.Thread(target=run) for _ in range(streams)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopped.set()
        for thread in threads:
            thread.join(120)
    assert len(answers) >= streams
    assert [answer for answer in answers if answer != expected] == []


@contextmanager
def held_back(cluster: Cluster, group: int, *, but: set[int]) -> Iterator[None]:
    """Copies of the group that start meanwhile stand still until the end. but: the pids of those that may go on."""
    ended, held = threading.Event(), set[int]()

    def run() -> None:
        while not ended.wait(0.1):
            for pid in cluster.expert_pids(group) - but - held:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
                    held.add(pid)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for pid in held:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def group_status(cluster: Cluster, group: int) -> dict:
    return cluster.status()["controller"]["groups"][group]


def wait_for_copies(cluster: Cluster, group: int, copies: int, *, timeout_s: float = 90) -> dict:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        status = group_status(cluster, group)
        if status["copies"] == status["target"] == copies:
            return status
        time.sleep(0.5)
    raise AssertionError(f"group {group} has not come to {copies} copies:\n{cluster.evidence()}")


def give(cluster: Cluster, file: Path, config: dict) -> None:
    file.write_text(yaml.safe_dump(config))
    done = cluster.run("up", "--config", str(file))
    assert done.returncode == 0, done.stderr
