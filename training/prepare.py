"""From nothing to token ids on disk: downloads the text, learns the tokenizer, and encodes every document.

python -m training.prepare [--work training/work]

work/downloads/            the three packages
work/tokenizer/            the tokenizer, as transformers and vLLM read it
work/tokens_train.npy      [num_tokens] uint16, documents one after another, each <s> ... </s>
work/tokens_held_out.npy   the same for the held-out documents
work/text.json             every document's name, source, held_out, bytes (UTF-8) and tokens (with both marks),
                           in the order in which the two arrays hold them
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from training.overlap import shared_passages
from training.text import Document, fetch, load_documents
from training.tokenizer import encode_documents, train_tokenizer

WORK = Path(__file__).parent / "work"

_VOCAB_SIZE = 4096
_CONTEXT = 4096


def prepare(work: Path, *, on_progress: Callable[[str], None] = print) -> None:
    """Fills the folder `work`; what is there already is kept.

    Raises ConfigError where a download fails or the text is not the pinned one.
    """
    if (work / "text.json").exists():  # it is written last
        on_progress(f"{work} is ready")
        return
    on_progress(f"fetching three packages into {work / 'downloads'}")
    fetch(work / "downloads")
    documents = load_documents(work / "downloads")
    on_progress(f"{len(documents)} documents, of which {sum(d.held_out for d in documents)} are held out")
    for name, share in shared_passages(documents).items():
        if share:
            on_progress(f"{share:.2%} of {name} can be read in the training text too")
    tokenizer = _make_tokenizer(work / "tokenizer", documents, on_progress)
    on_progress("encoding the documents")
    encoded = encode_documents(tokenizer, documents)
    np.save(work / "tokens_train.npy", encoded["train"])
    np.save(work / "tokens_held_out.npy", encoded["held_out"])
    rows = _describe(documents, encoded["num_tokens"].tolist())
    (work / "text.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for part, held_out in (("training", False), ("held out", True)):
        on_progress(f"{part}: {_summary([row for row in rows if row['held_out'] is held_out])}")


def _make_tokenizer(
    out: Path, documents: Sequence[Document], on_progress: Callable[[str], None]
) -> PreTrainedTokenizerFast:
    if (out / "tokenizer_config.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(out)
    on_progress(f"learning a tokenizer of {_VOCAB_SIZE} tokens")
    return train_tokenizer(documents, vocab_size=_VOCAB_SIZE, context=_CONTEXT, out=out)


def _describe(documents: Sequence[Document], num_tokens: Sequence[int]) -> list[dict[str, str | bool | int]]:
    return [
        {
            "name": document.name,
            "source": document.source,
            "held_out": document.held_out,
            "bytes": len(document.text.encode("utf-8")),
            "tokens": tokens,
        }
        for document, tokens in zip(documents, num_tokens)
    ]


def _summary(rows: Sequence[dict[str, str | bool | int]]) -> str:
    num_bytes, num_tokens = (sum(int(row[column]) for row in rows) for column in ("bytes", "tokens"))
    per_token = num_bytes / max(num_tokens, 1)
    return f"{len(rows)} documents, {num_bytes:,} bytes, {num_tokens:,} tokens, {per_token:.3f} bytes a token"


def main() -> None:
    parser = argparse.ArgumentParser(description="Downloads the text and turns it into tokens.")
    parser.add_argument("--work", type=Path, default=WORK, help=f"folder to fill (default: {WORK})")
    prepare(parser.parse_args().work)


if __name__ == "__main__":
    main()
