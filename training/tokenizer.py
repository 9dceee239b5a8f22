"""The nano model's tokenizer: a byte-level BPE learnt from the training documents, and the documents as token ids."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from deploy.tokenizer import byte_level_tokenizer
from training.text import Document

BOS, EOS = 1, 2

# A conversation is a scene of a play, the only dialogue that the model has read:
# the speaker in capitals with a full stop on a line of its own, what is said, and a blank line.
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}.\n{{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT.\n{% endif %}"
)


class EncodedText(TypedDict):
    """Documents as tokens, each `<s>`, its text, `</s>`, one after another in the order given."""

    train: NDArray[np.uint16]  # [num_train_tokens]
    held_out: NDArray[np.uint16]  # [num_held_out_tokens]
    num_tokens: NDArray[np.int64]  # [num_documents] of every document, training and held out, with its two marks


def train_tokenizer(
    documents: Iterable[Document], *, vocab_size: int = 4096, context: int = 4096, out: Path
) -> PreTrainedTokenizerFast:
    """Learns a tokenizer from the documents that are not held out, saves it into the folder `out`, and returns it.

    vocab_size: with the three special tokens and the 256 bytes.
    context: the most tokens that the model reads at once; written into the tokenizer's settings.

    It adds no `<s>` by itself: the text of a prompt is all that is encoded.
    """
    texts = (document.text for document in documents if not document.held_out)
    tokenizer = byte_level_tokenizer(texts, vocab_size=vocab_size, context=context, chat_template=_CHAT_TEMPLATE)
    tokenizer.save_pretrained(out)
    return tokenizer


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> EncodedText:
    """The documents as token ids. The vocabulary must fit into 16 bits."""
    assert len(tokenizer) <= np.iinfo(np.uint16).max + 1
    encoded = [_encode(tokenizer, document.text) for document in documents]
    nothing = np.empty(0, dtype=np.uint16)  # concatenate() wants at least one array
    train = [ids for ids, document in zip(encoded, documents) if not document.held_out]
    held_out = [ids for ids, document in zip(encoded, documents) if document.held_out]
    return EncodedText(
        train=np.concatenate([nothing, *train]),
        held_out=np.concatenate([nothing, *held_out]),
        num_tokens=np.array([len(ids) for ids in encoded], dtype=np.int64),
    )


def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> NDArray[np.uint16]:
    # The length warning is about prompts; a document is cut into windows later.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return np.array([BOS, *ids, EOS], dtype=np.uint16)
