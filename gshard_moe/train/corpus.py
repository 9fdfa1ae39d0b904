"""The corpus: bytes to train on, bytes held out, and how well gzip does on the latter.

Byte-level: every byte is a token, and the byte 0 after each document is its end mark. Which
documents are held out is a function of each one alone, so a corpus may grow and keep its split.
"""

import dataclasses
import gzip
import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8

from gshard_moe.train import documents
from gshard_moe.train.documents import CorpusError, Document

END = b"\0"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Text as bytes, in two parts.

    Attributes:
      train: the training documents, each followed by one 0 byte; read-only.
      held_out: the held-out documents, likewise; at least 2 bytes, so one target.
      num_train_documents: how many documents `train` holds.
      num_held_out_documents: how many documents `held_out` holds.
      held_out_rule: `documents`: whole documents are held out, each by the hash of its identity.
        `tail`: that left nothing on one side, so the last bytes of the largest document are held
        out; that document then counts on both sides, and adding documents may change the split.
      source: what it is, in one line.
      digest: SHA-256, in hexadecimal, of both parts; a run is resumed on equal digests only.
    """

    train: UInt8[np.ndarray, " _"]
    held_out: UInt8[np.ndarray, " _"]
    num_train_documents: int
    num_held_out_documents: int
    held_out_rule: Literal["documents", "tail"]
    source: str
    digest: str


class GzipBits(NamedTuple):
    """What `gzip -9` needs, in bits for each byte of text and end marks.

    Attributes:
      together: all documents as one file; a match reaches back 32 KiB, over documents too.
      file_by_file: the sum over the documents, each a file of its own, with its 18-byte frame.
    """

    together: float
    file_by_file: float


def read_corpus(paths: Sequence[str | Path] | None, *, held_out: float = 0.05) -> Corpus:
    """Reads text and splits it into a part to train on and a part held out.

    A document is held out if the SHA-256 of its identity, as a fraction of 2^256, is below
    `held_out`; the identity is the path relative to the directory given, the name of a file given
    itself, or the text of a record. So adding documents never moves another one. Where that leaves
    no text on one side (a single file), the `tail` rule of `Corpus.held_out_rule` is used.

    Args:
      paths: files and directories, see `documents.read_documents`; None: the sources of the
        running interpreter's standard library.
      held_out: in (0, 1), the share of documents held out, on average; of the largest document's
        bytes under the `tail` rule.
    Raises:
      CorpusError: with every fault of the files, or if there is no text to split.
    """
    if not 0 < held_out < 1:
        raise CorpusError([f"held_out must lie between 0 and 1; got held_out={held_out}"])
    if isinstance(paths, str | Path):
        message = f"paths must be a sequence of paths; got paths={str(paths)!r}"
        raise CorpusError([f"{message}; use [{str(paths)!r}]"])
    if paths is None:
        name = f"the standard library of Python {platform.python_version()}"
        found = documents.read_standard_library()
    elif paths:
        name = ", ".join(map(str, paths))
        found = documents.read_documents(paths)
    else:
        message = "paths must name a file or a directory; got paths=[]"
        raise CorpusError([f"{message}; use None for the standard library"])

    num_bytes = sum(len(document.text) for document in found)
    if num_bytes < 2:
        message = "a corpus must hold 2 bytes or more, one to train on and one to hold out"
        raise CorpusError([f"{name}: {message}; got {len(found)} documents, {num_bytes} bytes"])
    return _split(found, held_out, name)


def gzip_bits_per_byte(held_out: UInt8[np.ndarray, " _"]) -> GzipBits:
    """Compresses held-out documents, the yardstick for a model's bits per byte.

    Args:
      held_out: documents as in `Corpus.held_out`; the end marks are compressed and counted too, as
        a model has to predict them.
    Raises:
      ValueError: if the last document has no end mark.
    """
    text = held_out.tobytes()
    if not text.endswith(END):
        raise ValueError(
            "held_out must end with an end-of-document mark, the byte 0; "
            f"got {len(text)} bytes, the last ones {text[-4:]!r}; pass Corpus.held_out"
        )
    files = [document + END for document in text.split(END)[:-1]]
    return GzipBits(
        together=8 * _gzip_size(text) / len(text),
        file_by_file=8 * sum(map(_gzip_size, files)) / len(text),
    )


def _gzip_size(text: bytes) -> int:
    return len(gzip.compress(text, compresslevel=9, mtime=0))


def _split(found: Sequence[Document], held_out: float, name: str) -> Corpus:
    """Splits by document, or by the `tail` rule where that leaves no text on one side."""
    rule = "documents"
    train = [document.text for document in found if _fraction(document) >= held_out]
    kept = [document.text for document in found if _fraction(document) < held_out]
    if not any(train) or not any(kept):
        rule = "tail"
        train, kept = _cut_tail([document.text for document in found], held_out)

    train_bytes, held_out_bytes = _join(train), _join(kept)
    count = f"{len(found):,} document" + "s" * (len(found) != 1)
    what = f"{len(kept):,} of them" if rule == "documents" else "the tail of the largest"
    return Corpus(
        train=train_bytes,
        held_out=held_out_bytes,
        num_train_documents=len(train),
        num_held_out_documents=len(kept),
        held_out_rule=rule,
        source=f"{name}: {count}, {train_bytes.size:,} bytes to train on, "
        f"{held_out_bytes.size:,} held out ({what})",
        digest=_digest(train_bytes, held_out_bytes),
    )


def _fraction(document: Document) -> float:
    """Returns a number in [0, 1] that depends on the document's identity alone."""
    digest = hashlib.sha256(document.identity).digest()
    return int.from_bytes(digest) / 2**256


def _cut_tail(texts: list[bytes], held_out: float) -> tuple[list[bytes], list[bytes]]:
    """Returns the texts with the largest one's tail cut off, and that tail alone."""
    largest = max(range(len(texts)), key=lambda i: len(texts[i]))
    size = len(texts[largest])
    cut = size - max(1, min(size - 1, round(size * held_out)))
    train = [*texts[:largest], texts[largest][:cut], *texts[largest + 1 :]]
    return train, [texts[largest][cut:]]


def _join(texts: Sequence[bytes]) -> UInt8[np.ndarray, " _"]:
    return np.frombuffer(b"".join(text + END for text in texts), np.uint8)


def _digest(train: UInt8[np.ndarray, " _"], held_out: UInt8[np.ndarray, " _"]) -> str:
    # With its length first, no byte can change sides unnoticed.
    digest = hashlib.sha256(train.size.to_bytes(8, "big"))
    digest.update(train)
    digest.update(held_out)
    return digest.hexdigest()
