import json
import os
from pathlib import Path
from typing import Any

import pytest

from llmray import cli, preparation
from llmray.arguments import environment


@pytest.fixture
def run_file(tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMRAY_CACHE", str(tmp_path / "cache"))
    rows = [{"instruction": f"say {i}", "output": "w " * i} for i in range(1, 31)]
    rows.append({"instruction": "w " * 200, "output": "never reached"})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    keys: dict[str, Any] = {
        "model_name_or_path": str(tiny_llama_dir),
        "template": "chatml",
        "stage": "sft",
        "do_train": True,
        "dataset": "rows",
        "dataset_dir": str(tmp_path),
        "cutoff_len": 64,
        "output_dir": str(tmp_path / "out"),
    }
    path = tmp_path / "run.json"
    path.write_text(json.dumps(keys))
    return path


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    lines = capsys.readouterr().out.splitlines()
    return {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in lines if "  " in line}


def test_prepare_says_what_the_data_holds(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["prepare", str(run_file)]) == 0
    facts = said(capsys)
    assert facts["rows"].startswith("31 to train on")
    assert facts["cut to cutoff_len"] == "1 rows"
    assert "to 64 tokens" in facts["lengths"]
    assert Path(facts["picture"]).read_bytes().startswith(b"\x89PNG")
    [kept] = preparation.kept()
    assert (kept.key, kept.rows, kept.sets) == (facts["key"], 31, ("rows",))
    assert "targets" in facts["tokens"]
    assert facts["tokenised"] == "31 rows now"
    assert cli.main(["prepare", str(run_file)]) == 0
    assert said(capsys)["tokenised"] == "before"


@pytest.mark.parametrize(
    ("keys", "name"),
    [(["truncation=drop"], "over cutoff_len, left out"), ([], "cannot be read, left out")],
)
def test_prepare_counts_what_was_left_out(
    keys: list[str], name: str, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads(run_file.with_name("rows.json").read_text())
    run_file.with_name("rows.json").write_text(json.dumps([*rows, *([] if keys else [{}, 3])]))
    assert cli.main(["prepare", str(run_file), "bad_rows=skip", *keys]) == 0
    assert said(capsys)[name] == ("1 rows" if keys else "2 rows")


def test_kept_data_is_listed_and_removed(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for cutoff_len in (32, 64):
        assert cli.main(["prepare", str(run_file), f"cutoff_len={cutoff_len}"]) == 0
    first, last = (one.key for one in reversed(preparation.kept()))
    os.utime(Path(environment.prepared_directory(os.environ), last, "manifest.json"), (1e9, 1e9))
    assert cli.main(["prepare", str(run_file), "cutoff_len=64"]) == 0  # it is used again
    assert [one.key for one in preparation.kept()] == [last, first]
    capsys.readouterr()
    assert cli.main(["prepare", "--list"]) == 0
    listed = capsys.readouterr().out
    assert first in listed
    assert "2 kept in" in listed
    assert cli.main(["prepare", "--remove", "nothing-like-it"]) == 2
    assert "is no key of the store" in capsys.readouterr().err
    assert cli.main(["prepare", "--remove", first[:12]]) == 0
    assert [one.key for one in preparation.kept()] == [last]
    assert cli.main(["prepare", "--remove"]) == 2
    assert cli.main(["prepare", "--list", "more"]) == 2
