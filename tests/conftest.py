"""Fixtures that tests of several packages share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import make_model, make_tokenizer


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random llama and its tokenizer; read it, do not write it."""
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_tokenizer(directory)
    return make_model(directory)
