"""Reads documents from files: text, JSON lines, Parquet, ArrayRecord, or Python's own library.

A document is bytes; nothing is tokenised here. Files are read in sorted order, and a file's name is
its path relative to the directory that was given, so the same folder in another place, or on
another host, gives the same documents. All faults are reported at once.
"""

import json
import reprlib
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Folders of the standard library that are not it, or that are its (huge) tests.
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
# The manual as one generated file of 0.8 MB: on one side of the split it would be most of it.
_NOT_LIBRARY |= {"pydoc_data"}
# Written when a Python is built, with its paths: they differ between hosts of one version.
_BUILD_PREFIXES = ("config-", "_sysconfigdata")
_MAX_FAULTS = 20


class CorpusError(ValueError):
    """Reports everything that is wrong with a corpus at once.

    Attributes:
      faults: one message each, with the file, and the line or record in it.
    """

    def __init__(self, faults: Sequence[str]):
        """Joins the faults, a line each; of very many, the first ones."""
        self.faults = list(faults)
        lines = self.faults[:_MAX_FAULTS]
        if len(self.faults) > len(lines):
            lines.append(f"... and {len(self.faults) - len(lines)} more of {len(self.faults)}")
        super().__init__("\n".join(lines))


class Document(NamedTuple):
    """A text, and what it is known by.

    Attributes:
      identity: decides on which side of the held-out split it falls: a file's relative path, or
        the text itself for one record of many in a file.
      text: without NUL bytes: the NUL is the corpus' end-of-document mark.
    """

    identity: bytes
    text: bytes


def read_standard_library() -> list[Document]:
    """Reads the Python sources of the running interpreter's standard library.

    Its tests, its generated manual (`pydoc_data`) and what its build has written are left out.

    Raises:
      CorpusError: if it is not there as source files, as in a zipped or embedded Python.
    """
    root = Path(sysconfig.get_path("stdlib"))
    sources = [file for file in _walk(root, skip=_not_library) if file.suffix == ".py"]
    if not sources:
        raise CorpusError(
            [
                "the standard library must be there as source files; "
                f"got no .py file in stdlib={root}; give text of your own"
            ]
        )
    return _read_all([(file, file.relative_to(root).as_posix()) for file in sources], faults=[])


def read_documents(paths: Sequence[str | Path]) -> list[Document]:
    """Reads every document of some files and directories, in the order given.

    What a file is, its suffix says: `.jsonl` (one object a line, its string `text` is a document;
    blank lines are passed over), `.parquet` (column `text`), `.array_record` or `.arrayrecord`
    (each record is a document in UTF-8); any other file is text and one document, of any encoding
    without NUL bytes. Directories
    are read recursively, in sorted order; hidden files and folders in them are left out.

    Raises:
      CorpusError: with every fault: a path that is not there, a binary file, a broken record, ...
    """
    faults: list[str] = []
    found: list[tuple[Path, str]] = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append((path, path.name))
            continue
        inside = _walk(path, skip=_hidden)
        found += [(file, file.relative_to(path).as_posix()) for file in inside]
        if not inside:
            faults.append(f"{path}: a directory must hold files; got none that is not hidden")
    return _read_all(found, faults)


def _read_all(files: Sequence[tuple[Path, str]], faults: list[str]) -> list[Document]:
    """Reads `(file, name)` pairs, adds to `faults`, and raises them if there are any."""
    documents: list[Document] = []
    seen: dict[Path, Path] = {}
    for path, name in files:
        first = seen.setdefault(path.resolve(), path)
        if first is not path:
            faults.append(f"{path}: must be given once; got it as {first} too; leave one out")
            continue
        read = _READERS.get(path.suffix.lower(), _read_text)
        try:
            _check_is_file(path)
            for document in read(path, name):
                if isinstance(document, CorpusError):
                    faults.extend(document.faults)
                else:
                    documents.append(document)
        except CorpusError as error:
            faults.extend(error.faults)
        except OSError as error:
            faults.append(f"{path}: must be readable; got {error.strerror or error}")
    if faults:
        raise CorpusError(faults)
    return documents


def _walk(root: Path, *, skip: Callable[[str], bool]) -> list[Path]:
    """Returns the files below `root`, sorted; links to directories count as files."""
    found: list[Path] = []
    for folder, subfolders, files in root.walk():
        subfolders[:] = [name for name in subfolders if not skip(name)]
        found += [folder / name for name in files if not skip(name)]
    return sorted(found, key=Path.as_posix)


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _not_library(name: str) -> bool:
    return name in _NOT_LIBRARY or name.startswith(_BUILD_PREFIXES)


def _check_is_file(path: Path) -> None:
    if path.is_file():
        return
    if path.is_dir():  # only a link: following it could lead in a circle
        target = path.resolve()
        message = f"must not be a link to a directory; got a link to {target}; give {target} itself"
    elif path.exists():
        message = "must be a file or a directory; got neither (a device, a pipe, a socket)"
    else:
        message = "must exist; got no such file or directory"
    raise CorpusError([f"{path}: {message}"])


# Readers raise what is wrong with a file, and yield what is wrong with one of its records.


def _read_text(path: Path, name: str) -> Iterator[Document]:
    yield Document(name.encode(), _check_text(path.read_bytes(), where=str(path)))


def _read_jsonl(path: Path, name: str) -> Iterator[Document | CorpusError]:
    del name  # a record is known by its text
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                message = f"must be one JSON object; got {reprlib.repr(line)} ({error})"
                yield CorpusError([f"{where}: {message}"])
                continue
            yield _record(value.get("text") if isinstance(value, dict) else value, where=where)


def _read_parquet(path: Path, name: str) -> Iterator[Document | CorpusError]:
    del name
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise _missing_package(path, "pyarrow") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if "text" not in columns:  # pyarrow gives batches without columns instead
                message = f'must have a column "text"; got columns={columns}'
                raise CorpusError([f"{path}: {message}; rename the column of text"])
            number = 0
            for batch in file.iter_batches(columns=["text"]):
                for text in batch.column("text").to_pylist():
                    yield _record(text, where=f"{path}: row {number}")
                    number += 1
    except pyarrow.ArrowException as error:
        raise CorpusError([f"{path}: must be a Parquet file; got {error}"]) from error


def _read_array_record(path: Path, name: str) -> Iterator[Document | CorpusError]:
    del name
    try:
        from array_record.python import (
            array_record_module,  # pyright: ignore[reportAttributeAccessIssue]
        )
    except ImportError as error:
        raise _missing_package(path, "array_record") from error
    try:
        reader = array_record_module.ArrayRecordReader(str(path))
        records = reader.read_all()
        reader.close()  # raises too, after a failure
    except RuntimeError as error:
        raise CorpusError([f"{path}: must be an ArrayRecord file; got {error}"]) from error
    for number, record in enumerate(records):
        where = f"{path}: record {number}"
        try:
            yield _record(record.decode(), where=where)
        except UnicodeDecodeError as error:
            message = f"must be text in UTF-8; got {reprlib.repr(record)} ({error})"
            yield CorpusError([f"{where}: {message}"])


_READERS: dict[str, Callable[[Path, str], Iterator[Document | CorpusError]]] = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".array_record": _read_array_record,
    ".arrayrecord": _read_array_record,
}


def _record(text: Any, *, where: str) -> Document | CorpusError:
    """Returns one record of many as a document, known by its text; or what is wrong with it."""
    if not isinstance(text, str):
        return CorpusError([f'{where}: must have a string "text"; got {reprlib.repr(text)}'])
    try:
        checked = _check_text(text.encode(), where=where)
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        return CorpusError([f"{where}: must be Unicode text; got {error}"])
    except CorpusError as error:
        return error
    return Document(checked, checked)


def _check_text(text: bytes, *, where: str) -> bytes:
    """Returns `text` if it has no NUL byte."""
    offset = text.find(b"\0")
    if offset >= 0:
        message = f"must be text, without NUL bytes; got one at byte {offset} of {len(text)}"
        raise CorpusError([f"{where}: {message}; leave it out, or save it as UTF-8 text"])
    return text


def _missing_package(path: Path, package: str) -> CorpusError:
    message = f"needs {package}, which is not installed"
    return CorpusError([f'{path}: {message}; pip install "gshard-moe[data]"'])
