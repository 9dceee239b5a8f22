"""Compiles JSON schemas as an engine would, in a process that may be killed for it.

    python -m cluster.schema_process CHECKPOINT VOCAB_SIZE

Each line on standard input is a schema as a JSON string, each line on standard output its verdict: "" or a sentence.
"""

import json
import sys


def main(checkpoint: str, vocab_size: str) -> None:
    """Says "" once it is ready, and then a verdict for each schema."""
    # What these print must not be read as a verdict.
    out, sys.stdout = sys.stdout, sys.stderr
    import xgrammar
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=int(vocab_size))
    # Nothing is kept: a schema that was fast once must not make the process larger for ever.
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    print(json.dumps(""), file=out, flush=True)
    for line in sys.stdin:
        try:
            compiler.compile_json_schema(json.loads(line))
            verdict = ""
        except Exception as error:  # the library has no class of its own for what it does not take
            verdict = str(error).strip().splitlines()[-1][:200] or type(error).__name__
        print(json.dumps(verdict), file=out, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
