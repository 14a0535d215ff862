"""A file that is one JSON list: where its rows end, and the rows of a piece.

The file is never in memory as a whole.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from llmray.data.pieces import (
    CHUNK_BYTES,
    OTHER_BYTES,
    Cut,
    DataFile,
    Piece,
    is_text,
    opened,
    piece_text,
    skip_mark,
    wrong_bytes,
)
from llmray.errors import DataError

SPACE = " \t\r\n"


def cuts(file: DataFile) -> Iterator[Cut]:
    """Where each row of the list ends.

    Raises:
        DataError: the file is no JSON list in UTF-8.
    """
    window = _Window(file)
    decode = json.JSONDecoder().raw_decode
    with opened(file) as handle:
        window.open(handle)
        window.expect("[")
        while not window.at("]"):
            while True:
                try:
                    _, end = decode(window.text, window.position)
                    break
                except json.JSONDecodeError as error:
                    if not window.may_be_cut(error) or not window.extend():
                        raise window.malformed(error) from None
            yield window.advance(end)
            window.after_row()
        window.expect_end()


class _Window:
    """The part of a JSON list that is in memory, and the position in it."""

    def __init__(self, file: DataFile) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")(OTHER_BYTES)
        self.text, self.position = "", 0
        self._bytes = self._lines = self._rows = 0  # of what lies before position
        self._counted = 0  # the position up to which these were counted
        self._row_bytes = self._row_lines = 0  # at the end of the row before

    def open(self, handle: BinaryIO) -> None:
        self._handle = handle
        self._bytes = self._row_bytes = skip_mark(self._file, handle)
        self.extend()

    def extend(self) -> bool:
        """Read on; whether there was anything more."""
        raw = self._handle.read(max(CHUNK_BYTES, len(self.text)))
        more = self._decoder.decode(raw, final=not raw)
        if not raw:
            return False
        self._count(self.position)
        self.text = self.text[self.position :] + more
        self.position = self._counted = 0
        return True

    def may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether the error may come from the end of what is in memory alone."""
        return error.msg.startswith("Unterminated string") or error.pos > len(self.text) - 16

    def advance(self, position: int) -> Cut:
        """Step over a row; returns where it ended."""
        self.position = position
        self._count(position)
        taken = Cut(self._bytes, self._bytes - self._row_bytes, self._lines - self._row_lines)
        self._row_bytes, self._row_lines = self._bytes, self._lines
        self._rows += 1
        return taken

    def at(self, wanted: str) -> bool:
        """Whether the next character but blanks is `wanted`; steps over the blanks."""
        while True:
            while self.position < len(self.text) and self.text[self.position] in SPACE:
                self.position += 1
            if self.position < len(self.text) or not self.extend():
                return self.text.startswith(wanted, self.position)

    def expect(self, wanted: str) -> None:
        """Step over a character that must come."""
        if not self.at(wanted):
            raise self.malformed(f"{wanted!r} is missing")
        self.position += 1

    def expect_end(self) -> None:
        """Step over the list's end; only blanks may follow."""
        self.expect("]")
        self.at("")
        if self.position < len(self.text):
            raise self.malformed("more follows the end of the list")

    def after_row(self) -> None:
        """Step over what separates two rows; stand before the next row or the end of the list."""
        if self.at(","):
            self.position += 1
            if self.at("]"):
                raise self.malformed("a row is missing after the last comma")
        elif not self.at("]"):
            raise self.malformed("',' or ']' is missing")

    def malformed(self, error: json.JSONDecodeError | str) -> DataError:
        """The error that the list cannot be read on from the position, or from the error's."""
        position = self.position if isinstance(error, str) else error.pos
        what = error if isinstance(error, str) else error.msg
        self._count(self.position)
        line = self._lines + self.text.count("\n", self.position, position) + 1
        return DataError(
            f"{self._file.name}, row {self._rows + 1} (line {line}): malformed JSON: {what}. "
            "Required: one JSON list of objects, or one object on each line. Mend the file."
        )

    def _count(self, position: int) -> None:
        part = self.text[self._counted : position]
        self._bytes += len(part) if part.isascii() else len(part.encode(errors=OTHER_BYTES))
        self._lines += part.count("\n")
        self._counted = position


def _rows(piece: Piece) -> Iterator[tuple[int, Any]]:
    text, decode = piece_text(piece), json.JSONDecoder().raw_decode
    is_utf8 = is_text(text)
    position = 0
    for _ in range(piece.num_rows):
        while text[position] in SPACE + ",[":
            if text[position] == "[" and (piece.first_row or position != text.find("[")):
                break  # a row that is a list, where an object is required
            position += 1
        row, end = decode(text, position)
        yield position, row if is_utf8 else (wrong_bytes(text[position:end]) or row)
        position = end


def read(piece: Piece) -> Iterator[Any]:
    """The rows of a piece; a `RowError` in place of one that is not UTF-8."""
    for _, row in _rows(piece):
        yield row


def line_number(piece: Piece, index: int) -> int:
    """How many lines of a piece lie before a row."""
    text = piece_text(piece)
    for row, (position, _) in enumerate(_rows(piece)):
        if row == index:
            return text.count("\n", 0, position)
    raise AssertionError(f"{piece} has no row {index}")
