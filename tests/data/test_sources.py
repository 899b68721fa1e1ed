import json
import pickle
import re
import sys

import pyarrow as pa
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from pyarrow import parquet

from omni_jax.data.sources import Row, open_rows
from omni_jax.errors import InputError


def test_lines_are_found_without_being_loaded(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n{"text": "\xc3\xa9"}\r\n\r\n{"text": "b"}')
    rows = open_rows(str(path))
    assert [row.number for row in rows] == [1, 3, 5]  # as an editor counts them
    assert [json.loads(row.contents)["text"] for row in rows] == ["a", "é", "b"]
    assert rows[1].name == f"{path}:3"
    assert list(pickle.loads(pickle.dumps(rows))) == list(rows)


def test_lines_longer_than_a_scan(tmp_path, monkeypatch):
    monkeypatch.setattr("omni_jax.data.sources._SCAN", 7)
    path = tmp_path / "rows.jsonl"
    texts = [f'{{"text": "{"x" * n}"}}' for n in range(20)]
    path.write_text("\n".join(texts) + "\n")
    assert [row.contents.decode() for row in open_rows(str(path))] == texts


def test_records(tmp_path):
    path = tmp_path / "rows.arrayrecord"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for i in range(5):
        writer.write(json.dumps({"text": str(i)}).encode())
    writer.close()
    rows = open_rows(str(path))
    assert len(rows) == 5 and rows[3] == Row(str(path), 4, b'{"text": "3"}')
    assert pickle.loads(pickle.dumps(rows))[4].contents == b'{"text": "4"}'


def test_columns(tmp_path):
    path = tmp_path / "rows.parquet"
    messages = [[{"role": "user", "content": str(i)}] for i in range(7)]
    parquet.write_table(pa.table({"messages": messages, "images": [None] * 7}), path, row_group_size=1)
    rows = pickle.loads(pickle.dumps(open_rows(str(path))))
    for i in (6, 0, 1, 2, 3, 4, 5, 6):  # more than are kept
        assert rows[i] == Row(str(path), i + 1, {"messages": messages[i], "images": None})


def test_a_pattern_names_files_in_order(write_rows, tmp_path):
    write_rows({"text": "c"}, name="b.jsonl")
    write_rows({"text": "a"}, {"text": "b"}, name="a.jsonl")
    rows = open_rows(str(tmp_path / "*.jsonl"))
    assert [json.loads(row.contents)["text"] for row in rows] == ["a", "b", "c"]
    assert [row.number for row in rows] == [1, 2, 1]


def test_rows_in_a_bucket(gs):
    gs.pipe("gs://b/x/rows-1.jsonl", b'{"text": "a"}\n{"text": "b"}\n')
    gs.pipe("gs://b/x/rows-2.jsonl", b'{"text": "c"}\n')
    rows = open_rows("gs://b/x/rows-*.jsonl")
    assert [row.name for row in rows] == [f"gs://b/x/rows-{n}" for n in ("1.jsonl:1", "1.jsonl:2", "2.jsonl:1")]
    assert rows[1].contents == b'{"text": "b"}'
    gs.pipe("gs://b/rows.arrayrecord", b"x")
    with pytest.raises(InputError, match="mount the bucket with gcsfuse"):
        open_rows("gs://b/rows.arrayrecord")
    with pytest.raises(InputError, match="no file of rows at gs://b/none"):
        open_rows("gs://b/none*.jsonl")


def test_missing_libraries_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError, match=re.escape("pip install omni_jax[gcs]")):
        open_rows("gs://bucket/rows.jsonl")
    (tmp_path / "rows.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=re.escape("pip install omni_jax[parquet]")):
        open_rows(str(tmp_path / "rows.parquet"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.jsonl", "no file of rows at"),
        ("rows.json", "unknown kind of file of rows; known: .jsonl, .arrayrecord, .array_record, .parquet; of a list"),
        ("empty.jsonl", "holds no rows"),
        ("bad.arrayrecord", "is not an ArrayRecord file"),
        ("bad.parquet", "is not a Parquet file"),
        ("folder.jsonl", "cannot read"),
    ],
)
def test_files_that_are_refused(tmp_path, name, message):
    (tmp_path / "folder.jsonl").mkdir()
    for bad in ("rows.json", "bad.arrayrecord", "bad.parquet"):
        (tmp_path / bad).write_text("[]")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match=re.escape(message)):
        open_rows(str(tmp_path / name))
