"""How the drill finds the engines below an attention replica."""

from typing import cast

import psutil
import pytest

from benchmarks.drill_cluster import is_engine


class Process:
    def __init__(self, name: str, *cmdline: str) -> None:
        self.name = lambda: name
        self.cmdline = lambda: list(cmdline)


@pytest.mark.parametrize(
    ("process", "expected"),
    [
        (Process("VLLM::EngineCor"), True),
        (Process("VLLM::EngineCore", "VLLM::EngineCore"), True),
        (Process("python3", "python3", "-c", "from multiprocessing.spawn import spawn_main; spawn_main()"), True),
        (Process("python3", "python3", "-c", "from multiprocessing.resource_tracker import main;main(80)"), False),
        (Process("ray::Attention"), False),
    ],
)
def test_an_engine_is_known_by_its_title_or_by_how_it_was_started(process: Process, expected: bool) -> None:
    assert is_engine(cast("psutil.Process", process)) is expected
