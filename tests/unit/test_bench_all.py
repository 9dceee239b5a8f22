"""`make bench`: which parts run and which are kept, what is said of the goals, the page and the picture."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from benchmarks import bench, bench_parts
from benchmarks.bench import parse, run_part
from benchmarks.bench_chart import draw, lines_of
from benchmarks.bench_parts import Part, Wish, chosen, code_id, exit_code_of, mark_done, parts_of
from benchmarks.bench_results import Outcome, Summary, missing_notes, read_outcome, write_summary
from benchmarks.bench_verdicts import CHECKPOINTS, OVER_VLLM, Found, Verdict, ratios_of, verdicts_of
from benchmarks.command_line import command_of
from benchmarks.result_files import add_section, sections_of
from benchmarks.serving_machine import Machine

MACHINE = Machine(
    cpu="A CPU", cores=2, flags=(), memory_gib=24.0, system="Linux", versions={}, commit="abc", busy_share=0.0
)


def a_cell(setup: str, streams: int, **ratios: float) -> dict[str, object]:
    named = {
        name.replace("_", "-"): {"median": ratio, "lowest": ratio, "highest": ratio} for name, ratio in ratios.items()
    }
    return {"setup": setup, "streams": streams, "ratios": named}


def a_report(d4: float = 0.97, x2: float = 1.05) -> dict[str, object]:
    """Of bench_serving, as it stands in its file."""
    cells = [
        one
        for streams in OVER_VLLM
        for one in (
            a_cell("vllm", streams, vllm_tp2=2.0),
            a_cell("vllm-tp2", streams, vllm=0.5),
            a_cell("D=4", streams, vllm=d4, vllm_tp2=1.9),
            a_cell("D=4 x2", streams, vllm=x2, vllm_tp2=2.1),
        )
    ]
    return {"cells": cells}


FOUND = Found(
    serving={"bench-300m": [a_report()], "bench-1b": [a_report(d4=0.9, x2=0.8)]},
    micro=[
        {
            "headline": {
                "trip_us_1": 150.0,
                "trip_us_32": 450.0,
                "trip_growth_1": 1.2,
                "trip_growth_32": 1.5,
                "compute_memory_share_bfloat16": 0.7,
                "compute_matmul_share_float32": 0.4,
            }
        }
    ],
    endtoend=[
        {"title": "End to end: a, D=4", "corrected": {"64": {"HTTP": 0.8, "gRPC": 0.92}}},
        {"title": "End to end: a, D=4 x2", "corrected": {"64": {"HTTP": 0.85, "gRPC": 0.9}, "8": {"HTTP": 2.0}}},
    ],
    start=[{"first_token_s": 45.0}],
)


def verdict(of: Sequence[Verdict], words: str) -> Verdict:
    [found] = [one for one in of if words in one.what]
    return found


# Goals.


def test_every_goal_has_a_verdict_and_without_a_measurement_none_is_reached():
    found = verdicts_of(Found(serving={}))
    assert {one.line for one in found} == {1, 2, 3, 4, 5, 6}
    assert len(found) == 2 * 4 + 2 * 4 + 4 + 4 + 1 + 1
    assert all(one.measured is None and one.met is None for one in found)


def test_the_best_split_counts_at_every_load():
    found = verdicts_of(FOUND)
    best = verdict(found, "bench-300m, tokens/s over vllm, 64 streams")
    assert (best.measured, best.detail, best.met) == (1.05, "D=4 x2", True)
    other = verdict(found, "bench-1b, tokens/s over vllm, 8 streams")
    assert (other.measured, other.detail, other.met) == (0.9, "D=4", False)
    assert verdict(found, "bench-300m, tokens/s over vllm-tp2, 1 stream").measured == 2.1


def test_times_have_to_be_below_their_goals_and_shares_above():
    found = verdicts_of(FOUND)
    assert verdict(found, "1 token, us").met is True
    assert verdict(found, "32 tokens, us").met is False
    assert verdict(found, "D=8 over D=2, 32 tokens").met is True
    assert verdict(found, "share of the memory bandwidth, 1 to 32 tokens, bfloat16").met is True
    assert verdict(found, "share of the memory bandwidth, 1 to 32 tokens, float32").met is None
    assert verdict(found, "share of the matmul rate, 1024 tokens, float32").met is False
    assert verdict(found, "first token").met is True


def test_the_better_front_door_counts():
    found = verdict(verdicts_of(FOUND), "end to end")
    assert (found.measured, found.detail) == (0.92, "gRPC, D=4")


def test_a_setup_in_several_reports_has_the_ratio_of_the_first():
    assert ratios_of([a_report(d4=0.9), a_report(d4=0.1)], "vllm")[1]["D=4"] == 0.9


# The picture.


def test_a_line_has_the_ratios_of_one_setup_by_streams():
    lines = {line.setup: line for line in lines_of([a_report()])}
    assert set(lines) == {"vllm-tp2", "D=4", "D=4 x2"}
    assert lines["D=4"].streams == (1, 8, 32, 64)
    assert lines["D=4"].ratios == (0.97,) * 4
    assert lines["D=4"].colour == lines["D=4 x2"].colour != lines["vllm-tp2"].colour
    assert len({line.dash for line in lines.values()}) == 3


def test_the_picture_is_a_small_png(tmp_path: Path):
    lines = lines_of([a_report()])
    draw(dict.fromkeys(CHECKPOINTS, lines), tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) < 150_000


# Parts.


def test_all_splits_of_both_checkpoints_are_compared_with_both_ways_of_vllm():
    serving = [part for part in parts_of(Wish()) if part.name.startswith("serving")]
    setups: dict[str, set[str]] = {}
    for part in serving:
        listed = part.arguments[part.arguments.index("--setups") + 1].split(",")
        assert listed[:2] == ["vllm", "vllm-tp2"]
        setups.setdefault(part.checkpoint, set()).update(listed[2:])
    splits = {f"D={groups}{engines}" for groups in (2, 4, 8) for engines in ("", " x2")}
    assert setups == dict.fromkeys(CHECKPOINTS, splits)


def test_what_is_wished_reaches_every_part():
    for part in parts_of(Wish(rounds=2, streams=(1, 8), dtype="float32")):
        assert part.arguments[part.arguments.index("--rounds") + 1] == "2"
        if "streams" in part.name or part.module.endswith("serving"):
            assert part.arguments[part.arguments.index("--streams") + 1] == "1,8"
    [two] = [part for part in parts_of(Wish(streams=(1, 8))) if part.name == "endtoend-x2"]
    assert two.arguments[two.arguments.index("--streams") + 1] == "8"  # one stream cannot be shared


def test_a_name_stands_for_all_parts_that_begin_with_it():
    parts = parts_of(Wish())
    assert [part.name for part in chosen(parts, ["start", "serving-300m"])] == [
        "serving-300m",
        "serving-300m-d8",
        "start",
    ]
    with pytest.raises(ValueError, match="'serv'.*choose of serving-300m"):
        chosen(parts, ["serv"])


def test_a_part_is_done_only_for_the_same_command(tmp_path: Path):
    part = Part(name="a", module="m", arguments=("--rounds", "1"))
    assert exit_code_of(part, tmp_path) is None
    mark_done(part, tmp_path, took_s=1.0, exit_code=1)
    assert exit_code_of(part, tmp_path) == 1
    assert exit_code_of(Part(name="a", module="m", arguments=("--rounds", "2")), tmp_path) is None


def test_a_part_that_was_measured_is_not_measured_again_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ran: list[Sequence[str]] = []
    codes = iter((2, 1, 0))

    def run(command: Sequence[str], output: Path) -> int:
        ran.append(command)
        return next(codes)

    monkeypatch.setattr(bench, "_run", run)
    part = Part(name="a", module="m", arguments=("--rounds", "1"))
    options = bench.Options(parts=(part,), every=(part,), fresh=False, out=tmp_path)
    # What failed is tried again, what found something wrong has its results.
    assert [run_part(part, tmp_path / "a", options, 0) for _ in range(3)] == [2, 1, 1]
    assert len(ran) == 2
    assert ran[0][1:] == ["-m", "m", "--rounds", "1", "--out", str(tmp_path / "a")]
    fresh = bench.Options(parts=(part,), every=(part,), fresh=True, out=tmp_path)
    assert run_part(part, tmp_path / "a", fresh, 0) == 0


def test_results_do_not_make_the_code_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    answers = {"rev-parse": b"abc\n", "diff": b"", "ls-files": b""}
    monkeypatch.setattr(bench_parts, "_git", lambda *arguments: answers[arguments[0]])
    assert code_id() == "abc"
    answers["diff"] = b"+ a line"
    changed = code_id()
    assert changed.startswith("abc-")
    answers["diff"] = b"+ another"
    assert code_id() not in ("abc", changed)


def test_a_quick_run_needs_a_folder_of_its_own(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse(["--quick"])
    assert "--out" in capsys.readouterr().err
    assert len(parse(["--quick", "--out", "x"]).parts) == 4


def test_only_chosen_parts_are_measured_and_all_others_go_onto_the_page():
    options = parse(["--parts", "micro"])
    assert [part.name for part in options.parts] == ["micro"]
    assert len(options.every) == len(parts_of(Wish()))


# What is left behind.


def an_outcome(folder: Path, name: str, kind: str, plain: Mapping[str, object]) -> Outcome:
    add_section(folder / name, kind, "## A title\n\nA table.\n", plain, date="2026-01-01")
    [part] = [part for part in parts_of(Wish()) if part.name == name]
    return read_outcome(part, folder / name)


def a_summary(folder: Path) -> Summary:
    outcomes = [
        an_outcome(folder, "serving-300m", "serving", a_report()),
        an_outcome(folder, "serving-300m-d8", "serving", a_report()),
        an_outcome(folder, "start", "start", {"first_token_s": 45.0}),
    ]
    return Summary(
        date="2026-01-02",
        command="python -m benchmarks.bench",
        machine=MACHINE,
        outcomes=outcomes,
        notes=missing_notes(parts_of(Wish()), outcomes),
    )


def test_the_page_has_goals_picture_and_every_part(tmp_path: Path):
    page, _, picture = write_summary(a_summary(tmp_path), tmp_path / "results")
    text = page.read_text()
    assert text.startswith("# Benchmarks, 2026-01-02\n")
    assert f"({picture.name})" in text
    assert [section.splitlines()[0] for section in sections_of(text)] == [
        "## Goals",
        "## serving-300m: A title",
        "## serving-300m-d8: A title",
        "## start: A title",
    ]
    assert "| bench-300m, tokens/s over vllm, 64 streams " in text
    assert "Without results: serving-1b-d4, serving-1b-d2, serving-1b-d8, micro, endtoend, endtoend-x2." in text


def test_the_json_has_ratios_and_verdicts(tmp_path: Path):
    _, latest, _ = write_summary(a_summary(tmp_path), tmp_path / "results")
    found = json.loads(latest.read_text())
    assert found["ratios"]["bench-300m"]["vllm"]["64"]["D=4 x2"] == 1.05
    assert {one["met"] for one in found["verdicts"]} == {True, None}
    assert set(found["parts"]) == {"serving-300m", "serving-300m-d8", "start"}


def test_without_a_comparison_there_is_no_picture(tmp_path: Path):
    outcome = an_outcome(tmp_path, "start", "start", {"first_token_s": 70.0})
    summary = Summary(date="2026-01-02", command="this", machine=MACHINE, outcomes=[outcome], notes=[])
    page, latest = write_summary(summary, tmp_path / "results")
    assert "![" not in page.read_text()
    assert "NO" in page.read_text()
    assert [one["met"] for one in json.loads(latest.read_text())["verdicts"]][-1] is False


def test_a_quick_run_says_nothing_about_the_goals():
    [nano] = [part for part in parts_of(Wish(quick=True)) if part.checkpoint]
    [note] = missing_notes([nano], [Outcome(part=nano, sections=(), plain={})])
    assert "nothing about the goals" in note


def test_a_command_is_told_without_the_folder_of_its_results():
    arguments = ["--quick", "--out", "/a/folder", "--streams", "1,8", "--out=x"]
    assert command_of("bench", arguments) == "python -m benchmarks.bench --quick --streams 1,8"


def test_numbers_in_files_have_five_digits(tmp_path: Path):
    _, latest = add_section(tmp_path, "start", "## a\n", {"value": [1 / 3, 12345678.9, 7]}, date="2026-01-02")
    assert json.loads(latest.read_text())["start"]["a"]["value"] == [0.33333, 12346000.0, 7]
