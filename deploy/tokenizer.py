"""The tokenizer of our own checkpoints, whatever text it is learnt from."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")  # their ids are 0, 1, 2, as the presets say


def byte_level_tokenizer(
    texts: Iterable[str | list[str]], *, vocab_size: int, context: int, chat_template: str
) -> "PreTrainedTokenizerFast":
    """Learns a byte-level BPE with SPECIAL_TOKENS: every text has an encoding in it, and no mark is added to one.

    vocab_size: with the marks and the 256 bytes. context: the most tokens that the model reads at once.
    """
    # Imported here: the command line reads the marks, and does not need the libraries.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=context
    )
    tokenizer.chat_template = chat_template
    return tokenizer
