"""Documents come from every format as they went in, and whatever is wrong is said, all at once."""

import json
import sys
import sysconfig
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from array_record.python import array_record_module

from gshard_moe.train import documents
from gshard_moe.train.documents import CorpusError, Document

TEXTS = ["print('hé')\n", "", "line\u2028separator, not the end of a JSON line", "🜲"]


def _write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS))


def _write_raw_jsonl(path: Path) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS]
    path.write_bytes("\n".join(lines).encode())  # no newline at the end


def _write_parquet(path: Path) -> None:
    table = pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS})
    pyarrow.parquet.write_table(table, path, row_group_size=2)


def _write_dictionary_parquet(path: Path) -> None:
    text = pyarrow.array(TEXTS, pyarrow.large_string()).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), path)


def _write_array_record(path: Path) -> None:
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:2")
    for text in TEXTS:
        writer.write(text.encode())
    writer.close()


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", _write_jsonl),
        ("a.JSONL", _write_raw_jsonl),
        ("a.parquet", _write_parquet),
        ("a.parquet", _write_dictionary_parquet),
        ("a.array_record", _write_array_record),
        ("a.arrayrecord", _write_array_record),
    ],
)
def test_records_round_trip_and_are_known_by_their_text(tmp_path, name, write):
    write(tmp_path / name)
    expected = [Document(text.encode(), text.encode()) for text in TEXTS]
    assert documents.read_documents([tmp_path / name]) == expected


def test_text_of_any_encoding_is_taken_as_bytes(tmp_path):
    (tmp_path / "latin1.txt").write_bytes(b"h\xe9\r\n")
    (tmp_path / "no_suffix").write_bytes(b"x")
    paths = [str(tmp_path / "no_suffix"), tmp_path / "latin1.txt"]
    assert documents.read_documents(paths) == [
        Document(b"no_suffix", b"x"),
        Document(b"latin1.txt", b"h\xe9\r\n"),
    ]


def test_directories_are_read_sorted_by_relative_path_without_hidden_files(tmp_path):
    for name in ("b.md", "a/z.txt", "a/b/c.py", "a.txt", ".git/config", ".hidden", "a/.x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    _write_jsonl(tmp_path / "a" / "r.jsonl")
    texts = [document.text.decode() for document in documents.read_documents([tmp_path])]
    assert texts == ["a.txt", "a/b/c.py", *TEXTS, "a/z.txt", "b.md"]
    names = [document.identity for document in documents.read_documents([tmp_path / "a" / "b"])]
    assert names == [b"c.py"]


def test_standard_library():
    found = documents.read_standard_library()
    names = [document.identity.decode() for document in found]
    assert names == sorted(names)
    assert {"ast.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"}
    assert not left_out & {part for name in names for part in Path(name).parts}
    assert not any("_sysconfigdata" in name for name in names)
    source = Path(sysconfig.get_path("stdlib"), "ast.py").read_bytes()
    assert dict(found)[b"ast.py"] == source


def test_standard_library_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(CorpusError, match=r"there as source files; got no \.py file in stdlib=/"):
        documents.read_standard_library()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", b"ab\0c", r"a\.bin: .*without NUL bytes; got one at byte 2 of 4; leave it out"),
        ("a.jsonl", b'{"text": "x"}\n{"text"', r"a\.jsonl:2: must be one JSON object; got b'{"),
        ("a.jsonl", b'{"text": 3}', r'a\.jsonl:1: must have a string "text"; got 3'),
        ("a.jsonl", b'{"txt": "x"}', r'a\.jsonl:1: must have a string "text"; got None'),
        ("a.jsonl", b"[1]", r'a\.jsonl:1: must have a string "text"; got \[1\]'),
        ("a.jsonl", b'{"text": "x\\u0000"}', r"a\.jsonl:1: .*NUL bytes; got one at byte 1 of 2"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl:1: must be Unicode text; got .*surrogates"),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl:1: must be one JSON object; got .*decode"),
        ("a.parquet", b"no parquet", r"a\.parquet: must be a Parquet file; got "),
        ("a.array_record", b"no records", r"a\.array_record: must be an ArrayRecord file; got "),
        ("a.array_record", b"no records" * 9999, r"a\.array_record: must be an ArrayRecord file"),
    ],
)
def test_refuses_broken_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        documents.read_documents([tmp_path / name])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"txt": ["x"]}, r'must have a column "text"; got columns=\[\'txt\'\]; rename'),
        ({"text": ["x", None]}, r'a\.parquet: row 1: must have a string "text"; got None'),
        ({"text": [7]}, r'a\.parquet: row 0: must have a string "text"; got 7'),
    ],
)
def test_refuses_parquet_without_text(tmp_path, table, message):
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=message):
        documents.read_documents([tmp_path / "a.parquet"])


def test_refuses_records_that_are_not_utf8(tmp_path):
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "a.array_record"))
    writer.write(b"fine")
    writer.write(b"\xff")
    writer.close()
    with pytest.raises(CorpusError, match=r"record 1: must be text in UTF-8; got b'\\xff'"):
        documents.read_documents([tmp_path / "a.array_record"])


def test_refuses_an_array_record_that_was_cut_off(tmp_path):
    _write_array_record(tmp_path / "a.array_record")
    whole = (tmp_path / "a.array_record").read_bytes()
    (tmp_path / "a.array_record").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorpusError, match=r"a\.array_record: must be an ArrayRecord file; got "):
        documents.read_documents([tmp_path / "a.array_record"])


@pytest.mark.parametrize(
    ("module", "name"), [("pyarrow", "a.parquet"), ("array_record.python", "a.array_record")]
)
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, module, name):
    (tmp_path / name).touch()
    monkeypatch.setitem(sys.modules, module, None)  # as if not installed
    package = module.split(".")[0]
    message = rf'needs {package}, which is not installed; pip install "gshard-moe\[data\]"'
    with pytest.raises(CorpusError, match=message):
        documents.read_documents([tmp_path / name])


def test_all_faults_at_once(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path)
    (tmp_path / "folder" / "same.txt").symlink_to(tmp_path / "good.txt")
    (tmp_path / "folder" / "binary").write_bytes(b"\0")
    names = ["missing.txt", "empty", "good.txt", "folder"]
    with pytest.raises(CorpusError) as error:
        documents.read_documents([tmp_path / name for name in names])
    assert [fault.removeprefix(f"{tmp_path}/") for fault in error.value.faults] == [
        "empty: a directory must hold files; got none that is not hidden",
        "missing.txt: must exist; got no such file or directory",
        "folder/binary: must be text, without NUL bytes; got one at byte 0 of 1; "
        "leave it out, or save it as UTF-8 text",
        f"folder/link: must not be a link to a directory; got a link to {tmp_path}; "
        f"give {tmp_path} itself",
        f"folder/same.txt: must be given once; got it as {tmp_path}/good.txt too; leave one out",
    ]
    assert str(error.value) == "\n".join(error.value.faults)


def test_every_bad_record_of_a_file_is_told_and_blank_lines_are_passed_over(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x"}\n\n{"text": 3}\n{\n \n{"text": "y"}\n{"text": "\\u0000"}\n\n')
    with pytest.raises(CorpusError) as error:
        documents.read_documents([path])
    wheres = [fault.removeprefix(f"{path}:").split(":")[0] for fault in error.value.faults]
    assert wheres == ["3", "4", "7"]
    path.write_bytes(b'{"text": "x"}\n\n{"text": "y"}\n\n')
    assert [text for _, text in documents.read_documents([path])] == [b"x", b"y"]


def test_very_many_faults_are_counted():
    lines = str(CorpusError([f"fault {i}" for i in range(50)])).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "... and 30 more of 50"


def test_refuses_what_is_no_file(tmp_path):
    with pytest.raises(CorpusError, match=r"/dev/null: must be a file or a directory; got neither"):
        documents.read_documents(["/dev/null"])
