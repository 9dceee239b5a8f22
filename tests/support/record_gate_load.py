"""Records how the embedded checkpoint's gate spreads text over expert groups.

`python tests/support/record_gate_load.py` writes gate_load.json beside itself: for each window of this repository's
pages and then of its sources, how many rows each of the eight expert groups is sent, all layers together.
"""

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).parent / "gate_load.json"
WINDOW = 512  # tokens
NUM_WINDOWS = 360


def main() -> None:
    from transformers import PreTrainedTokenizerFast

    from router.balance import group_rows
    from training.export import load_exported

    torch.set_num_threads(1)  # a window is too small to share
    folder = ROOT / "deploy" / "nano"
    model, routed = load_exported(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = torch.tensor(tokenizer.encode(_text(), add_special_tokens=False))
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)[:NUM_WINDOWS]
    recorded = []
    for window in windows:
        routed.clear()
        with torch.no_grad():
            model(input_ids=window[None], use_cache=False)
        layers = [group_rows(idx, num_experts=32, num_groups=8) for idx in routed.topk_idx]
        recorded.append(torch.stack(layers).sum(dim=0).int().tolist())
    rows = ",\n".join(f"  {row}" for row in recorded)
    FILE.write_text(f'{{"tokens_per_window": {WINDOW}, "rows": [\n{rows}\n]}}\n')
    print(f"{len(recorded)} windows in {FILE}")


def _text() -> str:
    """All pages, then all sources that serve."""
    files = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    for room in ("experts", "router", "cluster", "deploy"):
        files += sorted((ROOT / room).glob("*.py"))
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
    json.loads(FILE.read_text())
