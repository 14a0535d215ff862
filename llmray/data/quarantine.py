"""Rows of a stream that cannot be read, put aside as they are met, each once.

They are JSON lines, as prepared data keeps them. Rows that are met before the file is known wait.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmray import store
from llmray.data.build import bad_line


class Quarantine:
    """What was put aside; of several ranks one has a file, the others only let go of the rows."""

    def __init__(self) -> None:
        self._waiting: list[Mapping[str, Any]] | None = []
        self._path: Path | None = None
        self._seen: set[tuple[str, int]] = set()

    def open(self, path: Path | None, *, keeps: bool) -> None:
        """Write to a file from now on, or nowhere.

        Args:
            path: of the file.
            keeps: whether the rows that lie there are of this run, which goes on.

        Raises:
            StoreError: the file cannot be written.
        """
        self._path, waiting, self._waiting = path, self._waiting or [], None
        if path is not None:
            lines = _whole_lines(path) if keeps else []
            self._seen = {_place(json.loads(line)) for line in lines}
            store.write_atomic(path, "".join(lines))
        self.add(waiting)

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Put rows aside, unless they are.

        Raises:
            StoreError: they cannot be written.
        """
        if self._waiting is not None:
            self._waiting += rows
            return
        new = [row for row in rows if _place(row) not in self._seen]
        if self._path is None or not new:
            return
        self._seen.update(map(_place, new))
        with store.explained(self._path), self._path.open("a") as file:
            file.writelines(map(bad_line, new))


def _place(row: Mapping[str, Any]) -> tuple[str, int]:
    return row["file"], row["row"]


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file whose writer may have been killed in the last one."""
    if not path.is_file():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
