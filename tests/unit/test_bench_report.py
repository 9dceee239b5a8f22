"""What benchmarks/bench_serving.py makes of its measurements: statistics, ratios, tables."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.result_files import replace_section
from benchmarks.serving_machine import Machine
from benchmarks.serving_process import ProcessMemory
from benchmarks.serving_report import Report, as_json, as_markdown, number, table, write
from benchmarks.serving_stats import (
    Measurement,
    Trace,
    best_splits,
    deal,
    differing,
    measure,
    paired_ratios,
    spread,
    summarise,
    tokens_of,
)


def measured(tokens_per_s: float, identical: float | None = 1.0) -> Measurement:
    return Measurement(
        tokens_per_s=tokens_per_s, ttft_p50_ms=1, ttft_p99_ms=2, gap_p50_ms=3, gap_p99_ms=4, identical=identical
    )


ROUNDS = {
    ("vllm", 8): [measured(100, None), measured(50, None), measured(200, None)],
    ("vllm-tp2", 8): [measured(40, 0.5), measured(25, 0.5), measured(80, 0.5)],
    ("D=4", 8): [measured(90), measured(48), measured(150)],
    ("D=4 x2", 8): [measured(95), measured(45), measured(190, 0.5)],
}
MACHINE = Machine(
    cpu="A CPU",
    cores=2,
    flags=("avx512f",),
    memory_gib=24.0,
    system="Linux",
    versions={"torch": "2.13.0"},
    commit="abc",
    busy_share=0.0,
)


def a_report(**changes: object) -> Report:
    report = Report(
        title="nano, float32",
        date="2026-01-02",
        command="python -m benchmarks.bench_serving",
        machine=MACHINE,
        settings={"threads": "1"},
        cells=summarise(ROUNDS, against=("vllm", "vllm-tp2")),
        memory={
            "vllm": [ProcessMemory(name="vllm", pss_bytes=1 << 30, rss_bytes=2 << 30)],
            "D=2": [
                ProcessMemory(name="D=2 router", pss_bytes=100 << 20, rss_bytes=150 << 20),
                ProcessMemory(name="D=2 attention-0", pss_bytes=200 << 20, rss_bytes=250 << 20),
            ],
        },
        notes=["A sentence."],
    )
    return replace(report, **changes)  # type: ignore[arg-type]


# Measuring.


def test_tokens_per_second_counts_all_engines_from_the_first_submission_to_the_last_token():
    early = Trace(begun_s=10.0, times_s=[[11.0, 12.0], [11.0, 13.0]], tokens=[[1, 2], [5, 6]])
    late = Trace(begun_s=10.5, times_s=[[11.5, 14.0]], tokens=[[3, 4]])
    assert measure([early, late], None).tokens_per_s == pytest.approx(6 / 4.0)


def test_latencies_are_those_of_single_tokens_from_the_own_submission_on():
    trace = Trace(begun_s=1.0, times_s=[[1.1, 1.2, 1.4], [1.3, 1.4, 1.5]], tokens=[[1, 2, 3], [4, 5, 6]])
    found = measure([trace], None)
    assert found.ttft_p50_ms == pytest.approx(200)
    assert found.gap_p50_ms == pytest.approx(100)
    assert found.gap_p99_ms == pytest.approx(197)  # of 100, 100, 100, 200


def test_a_single_token_has_no_gaps():
    found = measure([Trace(begun_s=0.0, times_s=[[0.5]], tokens=[[1]])], None)
    assert (found.gap_p50_ms, found.gap_p99_ms, found.tokens_per_s) == (0.0, 0.0, 2.0)


@pytest.mark.parametrize("num_engines", [1, 2, 3])
def test_what_is_dealt_to_engines_comes_back_in_its_order(num_engines: int):
    prompts = [[i, i + 1] for i in range(5)]
    traces = [
        Trace(begun_s=0.0, times_s=[[1.0]] * len(dealt), tokens=dealt) for dealt in deal(prompts, num_engines) if dealt
    ]
    assert tokens_of(traces) == prompts


def test_the_identical_share_counts_whole_streams():
    trace = Trace(begun_s=0.0, times_s=[[1.0, 2.0], [1.0, 2.0]], tokens=[[1, 2], [3, 4]])
    assert measure([trace], [[1, 2], [3, 9]]).identical == 0.5
    assert measure([trace], [(1, 2), (3, 4)]).identical == 1.0
    assert measure([trace], None).identical is None


# Summaries.


def test_a_spread_is_the_median_with_both_ends():
    found = spread([3.0, 1.0, 2.0])
    assert (found.median, found.lowest, found.highest) == (2.0, 1.0, 3.0)


def test_a_ratio_is_taken_round_by_round():
    # A machine that was half as fast in one round changes no ratio.
    assert paired_ratios([90, 45, 90], [100, 50, 100]).median == pytest.approx(0.9)
    assert paired_ratios([90, 45, 90], [100, 50, 100]).highest == pytest.approx(0.9)


def test_every_setup_is_divided_by_each_peer_but_itself():
    cells = {cell.setup: cell for cell in summarise(ROUNDS, against=("vllm", "vllm-tp2"))}
    assert set(cells["vllm"].ratios) == {"vllm-tp2"}
    assert cells["D=4"].ratios["vllm"].median == pytest.approx(0.9)
    assert cells["D=4"].ratios["vllm-tp2"].median == pytest.approx(1.92)
    assert cells["D=4"].figures["tokens_per_s"].median == 90
    assert cells["vllm"].identical is None
    assert cells["D=4 x2"].identical == pytest.approx(2.5 / 3)


def test_without_the_baseline_there_are_no_ratios_and_no_best():
    cells = summarise({("D=4", 8): ROUNDS["D=4", 8]}, against=("vllm",))
    assert cells[0].ratios == {}
    assert best_splits(cells) == {}


def test_the_best_split_has_the_highest_median_ratio():
    assert best_splits(summarise(ROUNDS, against=("vllm",)))[8].setup == "D=4 x2"


def test_only_splits_must_give_the_baselines_tokens():
    assert [cell.setup for cell in differing(summarise(ROUNDS, against=()))] == ["D=4 x2"]


# The report.


def test_a_table_is_filled_up_and_numbers_stand_to_the_right():
    assert table(("a", "long"), [["word", "1"]], numbers_from=1).splitlines() == [
        "| a    | long |",
        "| ---- | ---: |",
        "| word |    1 |",
    ]


@pytest.mark.parametrize(
    ("value", "shown"), [(0.9871, "0.987"), (1.234, "1.23"), (12.34, "12.3"), (345.6, "346"), (0.0, "0.000")]
)
def test_numbers_have_three_digits(value: float, shown: str):
    assert number(value) == shown


def test_the_report_names_machine_command_and_commit_and_every_cell():
    text = as_markdown(a_report())
    for expected in ("A CPU, 2 cores, 24.0 GiB", "avx512f", "torch 2.13.0", "commit: abc", "bench_serving`"):
        assert expected in text
    speeds = [line for line in text.splitlines() if line.startswith("| 8 ")]
    assert len(speeds) == len(ROUNDS) + 1  # and the best one
    assert "90.0 (48.0 to 150)" in speeds[2]
    assert "0.900 (0.750 to 0.960)" in speeds[2]
    assert "100.0%" in speeds[2]
    assert "A sentence." in text


def test_memory_is_given_per_process_and_as_a_sum_of_shared_pages():
    lines = as_markdown(a_report()).splitlines()
    assert any(line.split("|")[1:4] == [" D=2   ", " 2 together      ", "  300 "] for line in lines)
    assert any("D=2 router" in line and "100" in line and "150" in line for line in lines)


def test_the_json_has_the_ratios_of_the_best_split():
    plain = json.loads(json.dumps(as_json(a_report())))
    assert plain["best"]["8"]["setup"] == "D=4 x2"
    assert plain["best"]["8"]["ratios"]["vllm"] == pytest.approx(0.95)
    assert plain["cells"][2]["ratios"]["vllm"]["lowest"] == pytest.approx(0.75)


def test_a_second_run_takes_the_place_of_the_first_and_leaves_others_alone(tmp_path: Path):
    (tmp_path / "latest.json").write_text('{"micro": 1}')
    write(a_report(), tmp_path)
    write(a_report(title="large, bfloat16"), tmp_path)
    day, latest = write(a_report(notes=["Another sentence."]), tmp_path)
    text, found = day.read_text(), json.loads(latest.read_text())
    assert day.name == "2026-01-02-serving.md"
    assert text.startswith("# Serving, 2026-01-02\n\n## ")
    assert text.count("\n## ") == 2
    assert text.count("A sentence.") == 1
    assert "Another sentence." in text
    assert found["micro"] == 1
    assert set(found["serving"]) == {"nano, float32", "large, bfloat16"}


def test_a_section_is_replaced_by_its_heading_and_not_by_its_beginning():
    text = replace_section("# Top\n\n## one\n\nold\n\n## one more\n\nkept\n", "## one\n\nnew\n")
    assert text == "# Top\n\n## one more\n\nkept\n\n## one\n\nnew\n"
