"""Keeps other libraries' bars and advice off the user's console; llmray says what matters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger

from transformers.utils import logging

# bitsandbytes, which peft imports in every run, asks here for a faster kernel that is not needed
getLogger("bitsandbytes.backends.cpu.ops").setLevel(ERROR)


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers says errors alone."""
    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()
