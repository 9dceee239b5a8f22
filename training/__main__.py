"""`make nano`: text, two training runs, checkpoint, measurements, report; what is there already is not done again.

    python -m training [--work DIR] [--out DIR] [--docs DIR]

It may be killed at any time, and goes on where it stopped: inside a run, from its last checkpoint.
"""

import argparse
from pathlib import Path

from training.export import export
from training.measure import measure
from training.prepare import WORK, prepare
from training.runs import RUNS, run
from training.state import NAME

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training", description="Trains the embedded checkpoint anew.")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for text, runs and results")
    parser.add_argument("--out", type=Path, default=ROOT / "deploy" / "nano", help="folder for the checkpoint")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder for the report")
    args = parser.parse_args()
    prepare(args.work)
    for name in RUNS:
        run(name, args.work)
    trained, exported = args.work / "runs" / "balanced" / NAME, args.out / "model.safetensors"
    if not exported.exists() or exported.stat().st_mtime < trained.stat().st_mtime:
        export(trained.parent, args.work / "tokenizer", args.out)
    measure(args.work, args.out)
    # Imported here: figures need matplotlib, which nothing before them does.
    from training.card import write_card
    from training.report import write_report

    write_report(args.work, args.out, args.docs)
    write_card(args.work, args.out)


if __name__ == "__main__":
    main()
