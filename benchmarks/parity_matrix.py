"""`expertmesh parity` for every number of expert groups, data type and number of attention replicas, as one table.

    python -m benchmarks.parity_matrix [--prompts 16] [--tokens 32] [--dtype NAME] [--out FILE] [--resume]

Each case starts a cluster of its own and takes a few minutes on two cores. Results are kept in a file as they come;
with `--resume` a run that was interrupted goes on where it stopped.
"""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

DEFAULT_OUT = Path(".expertmesh") / "parity_matrix.jsonl"
GROUPS = (4, 1, 2, 8)
DTYPES = ("float32", "bfloat16")
ATTENTION = (1, 2)


def main() -> int:
    """Runs the missing cases; exit code 0 only if every one of them holds."""
    parser = argparse.ArgumentParser(prog="parity_matrix", description="Parity for every way to split and type.")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="where results are kept, one JSON object a line")
    parser.add_argument("--dtype", choices=DTYPES, help="this one only")
    parser.add_argument("--resume", action="store_true", help="keep the results that are there, of the same code")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        args.out.unlink(missing_ok=True)
    done = _read(args.out)
    dtypes = DTYPES if args.dtype is None else (args.dtype,)
    cases = list(itertools.product(ATTENTION, dtypes, GROUPS))
    for number, (attention, dtype, groups) in enumerate(cases, start=1):
        name = f"D={groups} {dtype} attention={attention} {args.prompts}x{args.tokens}"
        if name not in done:
            print(f"{number}/{len(cases)} {name}", file=sys.stderr, flush=True)
            done[name] = _run(groups, dtype, attention, prompts=args.prompts, tokens=args.tokens)
            with args.out.open("a") as file:
                file.write(json.dumps({"case": name, **done[name]}) + "\n")
        print(f"{name:<36} {'holds' if done[name].get('holds') else 'DOES NOT HOLD'}", flush=True)
    return 0 if all(result.get("holds") for result in done.values()) else 1


def _run(groups: int, dtype: str, attention: int, *, prompts: int, tokens: int) -> dict[str, object]:
    command = [sys.executable, "-m", "deploy.cli", "parity", "--json", "--groups", str(groups), "--dtype", dtype]
    command += ["--attention", str(attention), "--prompts", str(prompts), "--tokens", str(tokens)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    try:
        return {"exit_code": ended.returncode, **json.loads(ended.stdout)}
    except json.JSONDecodeError:
        return {"exit_code": ended.returncode, "holds": False}


def _read(file: Path) -> dict[str, dict[str, object]]:
    """Results of an earlier run by case; only those that held count as done."""
    lines = file.read_text().splitlines() if file.exists() else []
    results = [json.loads(line) for line in lines]
    return {result["case"]: result for result in results if result.get("holds")}


if __name__ == "__main__":
    sys.exit(main())
