"""Data files of every format as pieces of bounded size, and the rows of a piece.

Cutting reads a file once from its head and keeps nothing; the pieces can then be read by other
processes. Where pieces end depends on the files alone, never on who reads them.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from llmray.data import json_list
from llmray.data.conversation import RowError
from llmray.data.pieces import (
    BOM,
    OTHER_BYTES,
    Cut,
    DataFile,
    Piece,
    is_text,
    not_utf8,
    opened,
    piece_bytes,
    piece_text,
    skip_mark,
    wrong_bytes,
)
from llmray.errors import DataError


@dataclass(frozen=True)
class _Format:
    """`cuts` yields the end of every row in turn; `read` gives the rows of a piece, or errors.

    `lines` is None for tables, else how many lines of a piece lie before a row.
    """

    cuts: Callable[[DataFile], Iterator[Cut]]
    read: Callable[[Piece], Iterator[Any]]
    lines: Callable[[Piece, int], int] | None = None


def cut(file: DataFile, piece_bytes: int, limit: int | None = None) -> list[Piece]:
    """Pieces of a file that hold about `piece_bytes` each, of its first `limit` rows.

    Raises:
        DataError: the file cannot be read to its end as its format.
    """
    return list(pieces(file, piece_bytes, limit))


def pieces(file: DataFile, piece_bytes: int, limit: int | None = None) -> Iterator[Piece]:
    """The pieces of `cut`, each as soon as the file is read up to its end.

    Raises:
        DataError: the file cannot be read on as its format.
    """
    start = first_row = num_rows = num_bytes = num_lines = first_line = 0
    has_lines = FORMATS[file.format].lines is not None
    last = None
    for row in FORMATS[file.format].cuts(file):
        if limit is not None and first_row + num_rows == limit:
            break
        last = row
        num_rows, num_bytes, num_lines = (
            num_rows + 1,
            num_bytes + row.num_bytes,
            num_lines + row.num_lines,
        )
        if num_bytes >= piece_bytes:
            line = first_line if has_lines else None
            yield Piece(file, start, row.stop, first_row, num_rows, line)
            start, first_row, first_line = row.stop, first_row + num_rows, first_line + num_lines
            num_rows = num_bytes = num_lines = 0
    if last is not None and num_rows:
        line = first_line if has_lines else None
        yield Piece(file, start, last.stop, first_row, num_rows, line)


def read(piece: Piece) -> Iterator[Any]:
    """The rows of a piece in order; a `RowError` in place of one that cannot be read."""
    return FORMATS[piece.file.format].read(piece)


def place(piece: Piece, index: int) -> str:
    """Where the row number `index` of a piece stands: file, row and line, counted from 1."""
    path, row, line = position(piece, index)
    return f"{path}, row {row}" + (f" (line {line})" if line is not None else "")


def position(piece: Piece, index: int) -> tuple[str, int, int | None]:
    """The file, row and line of the row number `index` of a piece, counted from 1.

    The line is None in tables, which have none.
    """
    row = piece.first_row + index + 1
    lines = FORMATS[piece.file.format].lines
    if lines is None or piece.first_line is None:
        return piece.file.name, row, None
    return piece.file.name, row, piece.first_line + lines(piece, index) + 1


def content(piece: Piece, index: int) -> Any:
    """The row number `index` of a piece, read again."""
    return next(islice(read(piece), index, None))


# --- one row a line: JSON lines and plain text -----------------------------------------------


def _line_cuts(file: DataFile) -> Iterator[Cut]:
    with opened(file) as handle:
        skipped = stop = skip_mark(file, handle)
        lines = 0
        for line in handle:
            stop, lines, skipped = stop + len(line), lines + 1, skipped + len(line)
            if line.strip():
                yield Cut(stop, skipped, lines)
                lines = skipped = 0


def _lines(piece: Piece) -> Iterator[tuple[int, str | RowError]]:
    """Lines of a piece that are not blank, with the number of each in the piece, from 0."""
    raw = piece_bytes(piece)
    raw = raw.removeprefix(BOM) if piece.start == 0 else raw
    try:
        # not splitlines: JSON may hold other line separators of Unicode in its strings
        for number, line in enumerate(raw.decode().split("\n")):
            if line.strip():
                yield number, line
    except UnicodeDecodeError:
        yield from _lines_one_by_one(raw)


def _lines_one_by_one(raw: bytes) -> Iterator[tuple[int, str | RowError]]:
    for number, line in enumerate(raw.split(b"\n")):
        if not line.strip():
            continue
        try:
            yield number, line.decode()
        except UnicodeDecodeError as error:
            yield number, not_utf8(error, line)


def _line_number(piece: Piece, index: int) -> int:
    for row, (number, _) in enumerate(_lines(piece)):
        if row == index:
            return number
    raise AssertionError(f"{piece} has no row {index}")


def _read_json_lines(piece: Piece) -> Iterator[Any]:
    for _, line in _lines(piece):
        if isinstance(line, RowError):
            yield line
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            yield RowError(
                f"malformed JSON at column {error.colno}: {error.msg}. Required: one JSON object "
                "on each line.",
                line,
            )


def _read_text(piece: Piece) -> Iterator[Any]:
    for _, line in _lines(piece):
        yield line if isinstance(line, RowError) else {"text": line.rstrip("\r")}


# --- CSV -------------------------------------------------------------------------------------


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let CSV fields be as long as documents are; the library's limit is meant for tables."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


class _CountedLines:
    """Decoded lines of a file; counts what was taken."""

    def __init__(self, handle: BinaryIO, start: int) -> None:
        self._handle = handle
        self.stop, self.lines = start, 0

    def __iter__(self) -> Iterator[str]:
        for line in self._handle:
            self.stop, self.lines = self.stop + len(line), self.lines + 1
            yield line.decode(errors=OTHER_BYTES)


def _csv_rows(file: DataFile, handle: BinaryIO) -> Iterator[tuple[list[str], int, _CountedLines]]:
    """Rows that are not blank, each with the number of its first line, and what was taken."""
    lines = _CountedLines(handle, skip_mark(file, handle))
    reader = csv.reader(lines, strict=True)
    with _long_fields():
        try:
            first_line = 0
            for row in reader:
                if row:
                    yield row, first_line, lines
                first_line = lines.lines
        except csv.Error as error:
            raise DataError(
                f"{file.name}, line {lines.lines}: malformed CSV: {error}. Required: fields "
                "between commas, quoted where they hold commas, quotes or line ends."
            ) from None


def _csv_cuts(file: DataFile) -> Iterator[Cut]:
    with opened(file) as handle:
        stop = line = 0
        for index, (_, _, lines) in enumerate(_csv_rows(file, handle)):
            if index:
                yield Cut(lines.stop, lines.stop - stop, lines.lines - line)
                stop, line = lines.stop, lines.lines


def _csv_header(file: DataFile) -> list[str]:
    with opened(file) as handle:
        for row, _, _ in _csv_rows(file, handle):
            return row
    return []


def _read_csv(piece: Piece) -> Iterator[Any]:
    header = _csv_header(piece.file)
    text = piece_text(piece)
    with _long_fields():
        rows = [row for row in csv.reader(io.StringIO(text, newline="\n")) if row]
    is_utf8 = is_text(text)
    for row in rows[1:] if piece.start == 0 else rows:
        wrong = None if is_utf8 else wrong_bytes(",".join(row))
        if wrong is not None:
            yield wrong
        elif len(row) != len(header):
            yield RowError(
                f"{len(row)} fields, but the header has {len(header)}: {', '.join(header)}. "
                "Required: as many fields as columns.",
                ",".join(row),
            )
        else:
            yield dict(zip(header, row, strict=True))


def _csv_line_number(piece: Piece, index: int) -> int:
    with opened(piece.file) as handle:
        for row, (_, first_line, _) in enumerate(_csv_rows(piece.file, handle)):
            if row == piece.first_row + index + 1:  # the header is row 0
                return first_line - (piece.first_line or 0)
    raise AssertionError(f"{piece} has no row {index}")


# --- tables: parquet and Arrow ---------------------------------------------------------------


def _batches(file: DataFile, first_row: int = 0) -> Iterator[tuple[int, Any]]:
    """Record batches of a parquet or Arrow file in order, each with the number of its first row.

    Row groups of parquet that end before `first_row` are not read.
    """
    import pyarrow as pa
    from pyarrow import ipc
    from pyarrow import parquet as pq

    try:
        if file.format == "parquet":
            yield from _parquet_batches(pq.ParquetFile(file.path), first_row)
            return
        with pa.memory_map(file.path) as source:
            if source.read(6) == b"ARROW1":
                reader = ipc.open_file(source)
                yield from _numbered(map(reader.get_batch, range(reader.num_record_batches)), 0)
            else:
                source.seek(0)
                yield from _numbered(ipc.open_stream(source), 0)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file.name} cannot be read as {file.format}: {error}. Required: a whole file of that "
            "format. Mend or replace it."
        ) from error


def _parquet_batches(file: Any, first_row: int) -> Iterator[tuple[int, Any]]:
    at = 0
    for group in range(file.num_row_groups):
        num_rows = file.metadata.row_group(group).num_rows
        if at + num_rows > first_row:
            yield from _numbered(file.iter_batches(batch_size=1024, row_groups=[group]), at)
        at += num_rows


def _numbered(batches: Iterable[Any], at: int) -> Iterator[tuple[int, Any]]:
    for batch in batches:
        yield at, batch
        at += batch.num_rows


def _table_cuts(file: DataFile) -> Iterator[Cut]:
    stop = 0
    for _, batch in _batches(file):
        share = max(1, batch.nbytes // max(1, batch.num_rows))
        for _ in range(batch.num_rows):
            stop += 1
            yield Cut(stop, share, 0)


def _read_table(piece: Piece) -> Iterator[Any]:
    for at, batch in _batches(piece.file, piece.start):
        first, last = max(piece.start - at, 0), min(piece.stop - at, batch.num_rows)
        if first < last:
            yield from batch.slice(first, last - first).to_pylist()
        if at + batch.num_rows >= piece.stop:
            return


FORMATS: dict[str, _Format] = {
    "json list": _Format(json_list.cuts, json_list.read, json_list.line_number),
    "json lines": _Format(_line_cuts, _read_json_lines, _line_number),
    "txt": _Format(_line_cuts, _read_text, _line_number),
    "csv": _Format(_csv_cuts, _read_csv, _csv_line_number),
    "parquet": _Format(_table_cuts, _read_table),
    "arrow": _Format(_table_cuts, _read_table),
}
JSON = "json"
EXTENSIONS: dict[str, str] = {
    "json": JSON,
    "jsonl": "json lines",
    "txt": "txt",
    "csv": "csv",
    "parquet": "parquet",
    "arrow": "arrow",
}


def recognise(path: Path) -> DataFile:
    """The file with its format, by its extension; a .json file holds a list or lines.

    Raises:
        DataError: the extension is none of those that are read.
    """
    name = format_of(path.suffix.removeprefix(".").lower(), path)
    if name == JSON:
        name = "json list" if _begins_with_bracket(path) else "json lines"
    return DataFile(str(path), name)


def format_of(extension: str, name: str | Path) -> str:
    """The format of files of an extension: a key of `FORMATS`, or `JSON`, which has two.

    Raises:
        DataError: the extension is none of those that are read.
    """
    if extension not in EXTENSIONS:
        raise DataError(
            f"{name} has the extension {extension!r}. Required: one of {_listed(EXTENSIONS)}."
        )
    return EXTENSIONS[extension]


def _begins_with_bracket(path: Path) -> bool:
    file = DataFile(str(path), "json list")
    with opened(file) as handle:
        skip_mark(file, handle)
        while chunk := handle.read(4096):
            if chunk.strip():
                return chunk.lstrip().startswith(b"[")
    return False


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
