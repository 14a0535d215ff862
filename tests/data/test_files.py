import csv
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import ipc
from pyarrow import parquet as pq

from llmray.data import files
from llmray.data.conversation import RowError
from llmray.errors import DataError

ROWS = [
    {"instruction": f"say {i}", "output": "über\u2028alles\n" * (i % 4), "input": '[{"x": "]"}]'}
    for i in range(57)
]


def write_list(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=1, ensure_ascii=False), encoding="utf-8")


def write_list_with_mark(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS).encode())


def write_lines(path: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(lines).encode())


def write_csv(path: Path) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["instruction", "output", "input"])
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=10)


def write_arrow(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=9)


def write_arrow_stream(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=9)


WRITERS = {
    "list.json": write_list,
    "mark.json": write_list_with_mark,
    "lines.json": write_lines,
    "lines.jsonl": write_lines,
    "table.csv": write_csv,
    "table.parquet": write_parquet,
    "table.arrow": write_arrow,
    "stream.arrow": write_arrow_stream,
}


def rows_of(path: Path, piece_bytes: int = 1 << 20, limit: int | None = None) -> list:
    pieces = files.cut(files.recognise(path), piece_bytes, limit)
    rows = [row for piece in pieces for row in files.read(piece)]
    assert [piece.num_rows for piece in pieces] == [len(list(files.read(p))) for p in pieces]
    return rows


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("piece_bytes", [1, 300, 1 << 20])
def test_rows_are_those_of_the_file_whatever_the_size_of_the_pieces(
    tmp_path: Path, name: str, piece_bytes: int
) -> None:
    WRITERS[name](tmp_path / name)
    assert rows_of(tmp_path / name, piece_bytes) == ROWS


@pytest.mark.parametrize("name", WRITERS)
def test_a_limit_takes_the_head(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert rows_of(tmp_path / name, 200, limit=13) == ROWS[:13]


def test_a_list_larger_than_what_is_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmray.data.json_list.CHUNK_BYTES", 7)
    write_list(tmp_path / "list.json")
    assert rows_of(tmp_path / "list.json", 100) == ROWS


def test_text_is_a_row_a_line_and_blank_lines_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\r\n\n  \ntwo\u2028still two".encode())
    assert rows_of(tmp_path / "a.txt") == [{"text": "one"}, {"text": "two\u2028still two"}]


@pytest.mark.parametrize("piece_bytes", [1, 1 << 20])
@pytest.mark.parametrize(
    ("name", "content", "row", "line"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": 2}\n{"a" 3}\n', 2, 4),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', 1, 2),
        ("a.txt", b"fine\n\nnot \xe9 fine\n", 1, 3),
        ("a.csv", 'a,b\n1,"x\ny"\n\n3\n', 1, 5),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(
    tmp_path: Path, name: str, content: str | bytes, row: int, line: int, piece_bytes: int
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    pieces = files.cut(files.recognise(path), piece_bytes)
    found = [
        files.place(piece, index)
        for piece in pieces
        for index, value in enumerate(files.read(piece))
        if isinstance(value, RowError)
    ]
    assert found == [f"{path}, row {row + 1} (line {line})"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", '[\n{"a": 1},\n{"a": 2,}\n]', "row 2 (line 3): malformed JSON"),
        ("a.json", '[\n{"a": 1}\n{"a": 2}\n]', "row 2 (line 3): malformed JSON: ',' or ']'"),
        ("a.json", '[\n{"a": 1},\n{"a": "2', "row 2 (line 3): malformed JSON: Unterminated"),
        ("a.json", '[{"a": 1},\n]', "malformed JSON: a row is missing"),
        ("a.json", '[{"a": 1}]\n[]', "malformed JSON: more follows"),
        ("a.json", '[{"a": 1}]'.encode("utf-16"), "byte order mark of UTF-16"),
        ("a.csv", 'a,b\n1,"2\n', "line 2: malformed CSV"),
        ("a.parquet", b"PAR1 nothing", "cannot be read as parquet"),
        ("a.arrow", b"ARROW1 nothing", "cannot be read as arrow"),
    ],
)
def test_a_file_that_cannot_be_cut_is_refused_with_its_place(
    tmp_path: Path, name: str, content: str | bytes, said: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as error:
        files.cut(files.recognise(path), 1 << 20)
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_the_place_of_a_row_of_a_list_counts_rows_and_lines(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    write_list(path)
    lines = path.read_text(encoding="utf-8").split("\n")
    for piece in files.cut(files.recognise(path), 300):
        for index in range(piece.num_rows):
            row = piece.first_row + index
            line = next(n for n, text in enumerate(lines, 1) if f'"say {row}"' in text) - 1
            assert files.place(piece, index) == f"{path}, row {row + 1} (line {line})"


def test_row_groups_before_a_piece_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of 10 rows; the piece holds rows 32 to 44, of groups 3 and 4."""
    write_parquet(tmp_path / "table.parquet")
    groups: list[int] = []

    class Noting(pq.ParquetFile):
        def iter_batches(self, *words, row_groups, **named):
            groups.extend(row_groups)
            return super().iter_batches(*words, row_groups=row_groups, **named)

    monkeypatch.setattr(pq, "ParquetFile", Noting)
    file = files.recognise(tmp_path / "table.parquet")
    assert list(files.read(files.Piece(file, 32, 45, 32, 13))) == ROWS[32:45]
    assert groups == [3, 4]


def test_rows_that_are_lists_stay_rows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[[1, 2], [3], {"a": 1}]')
    assert rows_of(tmp_path / "a.json", 1) == [[1, 2], [3], {"a": 1}]


def test_an_unknown_extension_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Required: one of json, jsonl, txt, csv, parquet, arrow"):
        files.recognise(tmp_path / "a.xlsx")


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.json", b'[{"a": "1"},\n{"a": "\xff"},\n{"a": "3"}]', 2),
        ("a.jsonl", b'{"a": "1"}\n{"a": "\xff"}\n{"a": "3"}', 2),
        ("a.csv", b"a\n1\n\xff\n3\n", 3),
        ("a.txt", b"1\n\xff\n3\n", 2),
    ],
)
@pytest.mark.parametrize("piece_bytes", [1, 1 << 20])
def test_bytes_that_are_no_text_spoil_their_row_alone(
    tmp_path: Path, name: str, content: bytes, line: int, piece_bytes: int
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    found = [
        (row, files.place(piece, index))
        for piece in files.cut(files.recognise(path), piece_bytes)
        for index, row in enumerate(files.read(piece))
    ]
    assert len(found) == 3
    wrong, place = found[1]
    assert isinstance(wrong, RowError)
    assert "byte 0xff is not UTF-8" in str(wrong)
    assert r"\xff" in str(wrong.text)
    assert place == f"{path}, row 2 (line {line})"
    assert [list(row.values()) for row, _ in (found[0], found[2])] == [["1"], ["3"]]
