"""SIGINT and SIGTERM as a reason to stop, and the exit codes that follow from them."""

from __future__ import annotations

import os
import signal
from logging import getLogger
from types import FrameType
from typing import Any, Self

log = getLogger("llmray")

EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143}


class StopSignals:
    """Turns SIGINT and SIGTERM inside the block into a reason; the third ends the process."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def reason(self) -> str | None:
        """The name of the first signal that came, or None."""
        return self.seen[0] if self.seen else None

    def heard(self, name: str) -> None:
        """A signal came: the first or the second one."""
        if len(self.seen) == 1:
            log.info("%s: saving at the next step border, then ending", name)

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        self.seen.append(name)
        if len(self.seen) > 2:
            os._exit(EXIT_CODES[self.seen[0]])
        self.heard(name)
