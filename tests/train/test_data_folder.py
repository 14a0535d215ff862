"""Two steps on every text file of a folder of data sets, each in its stage.

The folder is the one that LLMRAY_BENCH_DATA names: LLaMA-Factory's demo data, as it is published.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from llmray import local
from llmray.arguments.loading import load
from llmray.errors import ArgumentsError
from llmray.train.observers import read_log

pytestmark = pytest.mark.slow

FOLDER = os.environ.get("LLMRAY_BENCH_DATA", "")
MEDIA = {"images", "videos", "audios"}
# what dataset_info.json does not list
UNLISTED = {
    "reason_tool_use_demo_50.jsonl": {
        "formatting": "openai",
        "columns": {"messages": "messages", "tools": "tools"},
    },
}


def listed() -> dict[str, dict[str, Any]]:
    """The entries of the folder whose file is there, by the file's name."""
    path = Path(FOLDER, "dataset_info.json")
    entries = json.loads(path.read_text()) if FOLDER and path.is_file() else {}
    named = {entry["file_name"]: entry for entry in entries.values() if "file_name" in entry}
    found = {**UNLISTED, **named}
    return {name: entry for name, entry in found.items() if FOLDER and Path(FOLDER, name).exists()}


LISTED = listed()
SETS = {name: entry for name, entry in LISTED.items() if not MEDIA & set(entry.get("columns", {}))}
needs_folder = pytest.mark.skipif(
    not SETS, reason="LLMRAY_BENCH_DATA names no folder with data sets"
)


def stages(entry: dict[str, Any]) -> tuple[str, ...]:
    """The stages that learn from rows of such a set."""
    columns = entry.get("columns", {})
    if entry.get("ranking"):
        return ("rm", "dpo")
    if "kto_tag" in columns:
        return ("kto",)
    return ("pt",) if set(columns) == {"prompt"} else ("sft",)


@needs_folder
def test_no_file_of_the_folder_is_forgotten() -> None:
    names = {path.name for path in Path(FOLDER).iterdir() if path.is_file()}
    assert names == {*LISTED, "dataset_info.json"}


@needs_folder
@pytest.mark.parametrize(
    ("name", "stage"), [(name, stage) for name, entry in SETS.items() for stage in stages(entry)]
)
def test_two_steps_of_each_file(
    name: str,
    stage: str,
    tmp_path: Path,
    tiny_llama_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LLMRAY_CACHE", str(tmp_path / "cache"))
    entry = {**SETS[name], "file_name": str(Path(FOLDER, name).resolve())}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": entry}))
    keys = {
        "model_name_or_path": str(tiny_llama_dir),
        "stage": stage,
        "do_train": True,
        "template": None if stage == "pt" else "chatml",
        "dataset": "rows",
        "dataset_dir": str(tmp_path),
        "finetuning_type": "lora",
        "cutoff_len": 512,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "output_dir": str(tmp_path / "out"),
        "fp32": True,
    }
    try:
        arguments = load({key: value for key, value in keys.items() if value is not None})
    except ArgumentsError as error:
        if "built yet" not in str(error):
            raise
        pytest.skip(f"stage {stage} is not built yet")
    assert local.train(arguments) == 0
    log = read_log(tmp_path / "out" / "trainer_log.jsonl")
    assert [record["current_steps"] for record in log] == [1, 2]
    assert all(0 < record["loss"] < 100 for record in log)
