"""The split is each document's own, the tail rule serves single files, and gzip's figures hold."""

import gzip
import hashlib
import re

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from gshard_moe.train import corpus
from gshard_moe.train.documents import CorpusError, Document


def _texts(part: np.ndarray) -> list[str]:
    return part.tobytes().decode().split("\0")[:-1]


def _write(folder, names):
    for name in names:
        (folder / name).write_text(f"text of {name}")


def _sides(folder, names):
    _write(folder, names)
    read = corpus.read_corpus([folder])
    assert read.held_out_rule == "documents"
    return _texts(read.train), _texts(read.held_out)


def test_split_by_hash_of_the_name(tmp_path):
    names = [f"{i:02}.txt" for i in range(60)]
    _write(tmp_path, names)
    read = corpus.read_corpus([tmp_path])
    below = [n for n in names if hashlib.sha256(n.encode()).digest()[0] / 256 < 0.05]
    assert below
    assert _texts(read.held_out) == [f"text of {name}" for name in below]
    assert _texts(read.train) == [f"text of {name}" for name in names if name not in below]
    assert (read.num_train_documents, read.num_held_out_documents) == (60 - len(below), len(below))
    assert read.held_out_rule == "documents"
    assert read.train.dtype == read.held_out.dtype == np.uint8
    assert read.source.startswith(f"{tmp_path}: 60 documents, ")
    assert read.source.endswith(f" held out ({len(below)} of them)")


def test_adding_documents_moves_none(tmp_path):
    names = [f"{i:02}.txt" for i in range(60)]
    train, held_out = _sides(tmp_path, names)
    more_train, more_held_out = _sides(tmp_path, [f"new{i}.txt" for i in range(60)])
    assert set(train) < set(more_train)
    assert set(held_out) < set(more_held_out)


def test_the_place_of_a_folder_does_not_matter(tmp_path):
    names = [f"{i:02}.txt" for i in range(60)]
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        _write(tmp_path / place, names)
    digests = {corpus.read_corpus([tmp_path / place]).digest for place in ("here", "there")}
    assert len(digests) == 1


def test_a_larger_share_holds_out_more_of_the_same(tmp_path):
    _write(tmp_path, [f"{i:03}.txt" for i in range(200)])
    parts = [
        set(_texts(corpus.read_corpus([tmp_path], held_out=share).held_out))
        for share in (0.05, 0.2, 0.5)
    ]
    assert parts[0] < parts[1] < parts[2]
    assert 80 <= len(parts[2]) <= 120  # 2.8 sigma, and the hash is fixed


def test_equal_records_fall_on_one_side(tmp_path):
    lines = [f'{{"text": "{i}"}}\n' for i in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(lines * 2))
    read = corpus.read_corpus([tmp_path / "a.jsonl"])
    assert not set(_texts(read.train)) & set(_texts(read.held_out))
    assert read.num_train_documents + read.num_held_out_documents == 200


def test_tail_rule_for_a_single_file(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 90 + "y" * 10)
    read = corpus.read_corpus([tmp_path / "a.txt"], held_out=0.1)
    assert read.held_out_rule == "tail"
    assert read.train.tobytes() == b"x" * 90 + b"\0"
    assert read.held_out.tobytes() == b"y" * 10 + b"\0"
    assert (read.num_train_documents, read.num_held_out_documents) == (1, 1)
    assert read.source == (
        f"{tmp_path}/a.txt: 1 document, 91 bytes to train on, 11 held out (the tail of the largest)"
    )


def test_tail_rule_takes_the_largest_document(tmp_path):
    # No hash of these names is below 0.05, so all would be trained on.
    for name, text in [("a.txt", "aa"), ("b.txt", "b" * 40), ("c.txt", "")]:
        (tmp_path / name).write_text(text)
    read = corpus.read_corpus([tmp_path])
    assert read.held_out_rule == "tail"
    assert read.train.tobytes() == b"aa\0" + b"b" * 38 + b"\0" + b"\0"
    assert read.held_out.tobytes() == b"bb\0"
    assert (read.num_train_documents, read.num_held_out_documents) == (3, 1)


@hypothesis.given(
    st.lists(st.binary(max_size=6).filter(lambda text: 0 not in text), min_size=1, max_size=6),
    st.floats(0.001, 0.999),
)
def test_every_byte_is_on_one_side_and_neither_is_without_text(texts, share):
    hypothesis.assume(sum(map(len, texts)) >= 2)
    read = corpus._split([Document(text, text) for text in texts], share, "texts")
    both = read.train.tobytes() + read.held_out.tobytes()
    assert sorted(both.replace(b"\0", b"")) == sorted(b"".join(texts))
    for part, count in [
        (read.train, read.num_train_documents),
        (read.held_out, read.num_held_out_documents),
    ]:
        assert part.tobytes().count(b"\0") == count
        assert part[-1] == 0
        assert np.count_nonzero(part)


def test_digest_tells_content_and_split_apart(tmp_path):
    def digest(text: str, share: float) -> str:
        (tmp_path / "a.txt").write_text(text)
        return corpus.read_corpus([tmp_path / "a.txt"], held_out=share).digest

    first = digest("abcdefgh", 0.25)
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert first == digest("abcdefgh", 0.25)
    assert len({first, digest("abcdefgh", 0.5), digest("abcdefgx", 0.25)}) == 3


def test_a_byte_cannot_change_sides_unnoticed():
    whole = np.frombuffer(b"a\0b\0c\0", np.uint8)
    assert corpus._digest(whole[:2], whole[2:]) != corpus._digest(whole[:4], whole[4:])


def test_standard_library_corpus():
    read = corpus.read_corpus(None)
    assert read.held_out_rule == "documents"
    assert read.source.startswith("the standard library of Python 3.")
    assert read.train.size > 5_000_000
    assert 0.02 < read.held_out.size / read.train.size < 0.15
    gzip_bits = corpus.gzip_bits_per_byte(read.held_out)
    assert 1 < gzip_bits.together < gzip_bits.file_by_file < 4


def test_gzip_by_hand():
    files = [b"def f(x):\n    return x\n" * 4 + b"\0", b"\0", b"import gzip\n\0"]
    text = b"".join(files)
    bits = corpus.gzip_bits_per_byte(np.frombuffer(text, np.uint8))
    sizes = [len(gzip.compress(file, 9, mtime=0)) for file in files]
    assert bits.together == 8 * len(gzip.compress(text, 9, mtime=0)) / len(text)
    assert bits.file_by_file == 8 * sum(sizes) / len(text)


def test_gzip_refuses_text_without_end_mark():
    with pytest.raises(ValueError, match=r"must end with .* the byte 0; got 4 bytes, .*b'text'"):
        corpus.gzip_bits_per_byte(np.frombuffer(b"text", np.uint8))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_refuses_shares_outside_0_1(share):
    with pytest.raises(CorpusError, match=f"held_out must lie between 0 and 1; got .*={share}"):
        corpus.read_corpus(None, held_out=share)


def test_refuses_what_names_no_file():
    with pytest.raises(CorpusError, match=r"must name a file or a directory; got paths=\[\]; use"):
        corpus.read_corpus([])
    with pytest.raises(CorpusError, match=r"got paths='a\.txt'; use \['a\.txt'\]"):
        corpus.read_corpus("a.txt")
    with pytest.raises(CorpusError, match="nowhere.txt: must exist"):
        corpus.read_corpus(["nowhere.txt"])


@pytest.mark.parametrize(("text", "size"), [("", 0), ("x", 1)])
def test_refuses_a_corpus_without_text(tmp_path, text, size):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(CorpusError, match=f"2 bytes or more, .*got 1 documents, {size} bytes"):
        corpus.read_corpus([tmp_path / "a.txt"])
