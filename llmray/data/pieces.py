"""A piece of a data file, and the bytes of files and pieces, for the readers of all formats."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from llmray.data.conversation import RowError
from llmray.errors import DataError

CHUNK_BYTES = 1 << 22
OTHER_BYTES = "surrogateescape"  # how bytes that are not UTF-8 pass through a text
BOM = codecs.BOM_UTF8
OTHER_ENCODINGS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class DataFile:
    """A file and the key of `FORMATS` that reads it.

    `origin` is the compressed file or the URL that it is made from, when it is first read;
    `identity` says which bytes an origin has, where reading them is not the way to know.
    """

    path: str
    format: str
    origin: str | None = None
    identity: str | None = None

    @property
    def name(self) -> str:
        """What a user knows it as."""
        return self.origin or self.path


@dataclass(frozen=True)
class Piece:
    """Some rows of a file that follow one another.

    `start` and `stop` are bytes of text formats and rows of tables. `first_row` and `first_line`
    count from 0; a table has no lines.
    """

    file: DataFile
    start: int
    stop: int
    first_row: int
    num_rows: int
    first_line: int | None = None


@dataclass(frozen=True)
class Cut:
    """How far into a file a row reaches: bytes, or rows of a table."""

    stop: int
    num_bytes: int
    num_lines: int


@contextmanager
def opened(file: DataFile) -> Iterator[BinaryIO]:
    """The file, open for reading bytes.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with open(file.path, "rb") as handle:
            yield handle
    except OSError as error:
        raise DataError(
            f"{file.name} cannot be read: {error.strerror or error}. Required: a file of the data "
            "set that this user may read. Mend its name in dataset_info.json or its permissions."
        ) from error


def piece_bytes(piece: Piece) -> bytes:
    """The bytes of a piece of a text format."""
    with opened(piece.file) as handle:
        handle.seek(piece.start)
        return handle.read(piece.stop - piece.start)


def skip_mark(file: DataFile, handle: BinaryIO) -> int:
    """Step over a byte order mark; returns its size."""
    head = handle.read(4)
    if head.startswith(OTHER_ENCODINGS):
        raise DataError(
            f"{file.name} begins with the byte order mark of UTF-16. Required: UTF-8. Convert it, "
            f"for instance: iconv -f UTF-16 -t UTF-8 {Path(file.name).name}"
        )
    size = len(BOM) if head.startswith(BOM) else 0
    handle.seek(size)
    return size


def not_utf8(error: UnicodeDecodeError, row: bytes | None = None) -> RowError:
    """What to say of bytes that are not text."""
    return RowError(
        f"byte 0x{error.object[error.start]:02x} is not UTF-8. Required: text in UTF-8. Convert "
        "the file, or mend the row.",
        None if row is None else row.decode(errors="backslashreplace"),
    )


def piece_text(piece: Piece) -> str:
    """The text of a piece without a byte order mark; its wrong bytes as `OTHER_BYTES` has them."""
    raw = piece_bytes(piece)
    return (raw.removeprefix(BOM) if piece.start == 0 else raw).decode(errors=OTHER_BYTES)


def is_text(text: str) -> bool:
    """Whether a text read with `OTHER_BYTES` was UTF-8."""
    return text.isascii() or wrong_bytes(text) is None


def wrong_bytes(text: str) -> RowError | None:
    """What to say of a text read with `OTHER_BYTES`, if it was not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raw = text.encode(errors=OTHER_BYTES)
        try:
            raw.decode()
        except UnicodeDecodeError as error:
            return not_utf8(error, raw)
    return None
