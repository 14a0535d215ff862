import pytest

from llmray.arguments import capabilities


@pytest.fixture(autouse=True)
def _sweeps_work(monkeypatch):
    monkeypatch.delitem(capabilities.NOT_BUILT, "tune", raising=False)
