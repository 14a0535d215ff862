"""Fixtures that tests of several packages share."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from tiny import make_model, make_tokenizer


def pytest_collection_modifyitems(items):
    """Tests on Ray start many processes, and wait for one another's on a machine of few cores."""
    for item in items:
        if item.get_closest_marker("ray") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1200))


@pytest.fixture
def own_console():
    """Takes away the log handler that a command installs: it holds this test's stderr."""
    log = logging.getLogger("llmray")
    yield
    log.handlers.clear()
    log.propagate = True
    log.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random llama and its tokenizer; read it, do not write it."""
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_tokenizer(directory)
    return make_model(directory)
