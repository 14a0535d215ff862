"""Secrets of a run stay out of its files, its log and its messages; code of models is recorded."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from llmray import local
from llmray.arguments.loading import load

SECRETS = {
    "hf_hub_token": "canary-hf-1",
    "ms_hub_token": "canary-ms-2",
    "om_hub_token": "canary-om-3",
}
VARIABLES = {
    "HF_TOKEN": "canary-hf-6",
    "MODELSCOPE_API_TOKEN": "canary-ms-7",
    "OM_HUB_TOKEN": "canary-om-8",
}


@pytest.fixture
def keys(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, object]:
    rows = [{"instruction": f"Say {i}.", "output": "word " * (i % 9 + 1)} for i in range(12)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    monkeypatch.setenv("LLMRAY_CACHE", str(tmp_path / "cache"))
    return {
        "stage": "sft",
        "do_train": True,
        "template": "chatml",
        "dataset": "rows",
        "dataset_dir": str(tmp_path),
        "model_name_or_path": "org/tiny",
        "max_steps": 2,
        "save_steps": 1,
        "logging_steps": 1,
        "fp32": True,
        "plot_loss": True,
        "report_to": "tensorboard",
        "output_dir": str(tmp_path / "out"),
    }


def test_no_token_is_in_a_file_of_the_run_or_in_its_log(
    keys, tmp_path, tiny_llama_dir, monkeypatch, caplog, capfd
) -> None:
    """The hub's package is asked with the key's token; nothing else ever shows one."""
    given: list[str] = []

    def snapshot_download(name: str, **settings: object) -> str:
        given.append(str(settings["token"]))
        return str(tiny_llama_dir)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.DEBUG):
        assert local.train(load({**keys, **SECRETS}, environ={})) == 0
    assert set(given) == {SECRETS["hf_hub_token"]}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 15
    assert {path.name for path in files} >= {"run_arguments.yaml", "adapter_config.json"}
    assert [path for path in files if b"canary" in path.read_bytes()] == []
    said = caplog.text + "".join(capfd.readouterr())
    assert "parameters train" in said
    assert "canary" not in said


@pytest.mark.parametrize("runs_code", [True, False])
def test_code_of_a_model_is_said_and_recorded(
    keys, tmp_path, tiny_llama_dir, runs_code, caplog
) -> None:
    more = {"model_name_or_path": str(tiny_llama_dir), "trust_remote_code": runs_code}
    with caplog.at_level(logging.WARNING, "llmray"):
        assert local.train(load({**keys, **more, "max_steps": 1}, environ={})) == 0
    assert ("trust_remote_code: Python code in" in caplog.text) == runs_code
    written = load(tmp_path / "out" / "run_arguments.yaml", environ={})
    assert written.model.trust_remote_code == runs_code
