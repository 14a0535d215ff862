"""The files beside the checkpoints: logs, results, plots, final weights.

They are written to a local directory: the run directory itself, or, where that is a URI, a
temporary one whose files `publish` copies there.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmray import store
from llmray.data.prepared import BAD_ROWS
from llmray.train.observers import LOG_NAME
from llmray.train.trackers import IDENTITY_NAME


class Artefacts:
    """The files of rank 0; the other ranks write and publish nothing."""

    def __init__(self, run_dir: str, *, is_main: bool) -> None:
        """Raises StoreError where rank 0 cannot write."""
        self.run_dir = run_dir
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._is_main = is_main
        if store.is_uri(run_dir):
            self._temporary = tempfile.TemporaryDirectory(prefix="llmray-")
            self.directory = Path(self._temporary.name)
            if is_main:
                names = [LOG_NAME, IDENTITY_NAME, "all_results.json", BAD_ROWS]
                store.fetch(run_dir, names, self.directory)
        else:
            self.directory = Path(run_dir)
        if is_main:
            self.write_json(".writable", {})
            (self.directory / ".writable").unlink()

    def write_files(self, write: Callable[[Path], None]) -> None:
        """Let `write` fill a directory, then move its files here, each whole or not at all."""
        with store.staging(self.directory / "files") as directory:
            write(directory)
            store.share(directory)
            store.move_files(directory, self.directory)

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """Write `values` to the file `name`, whole or not at all."""
        self.write_text(name, json.dumps(values, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write `text` to the file `name`, whole or not at all."""
        store.write_atomic(self.directory / name, text)

    def read_json(self, name: str) -> dict[str, Any]:
        """The values in the file `name`, nothing where there is none."""
        path = self.directory / name
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    def publish(self) -> None:
        """Copy what was written to the run directory, where that is a URI."""
        if self._temporary is not None and self._is_main:
            # trackers write here too, from threads and processes of their own
            store.upload(self.directory, self.run_dir, may_vanish=True)
