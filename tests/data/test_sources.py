import json
from pathlib import Path
from typing import Any

import pytest

from llmray.data import sources
from llmray.data.conversation import RowFormat
from llmray.errors import DataError

ROW = {"instruction": "a", "output": "b"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.json").write_text(json.dumps([ROW]))
    return tmp_path


def describe(folder: Path, entry: Any) -> sources.DataSet:
    (folder / "dataset_info.json").write_text(json.dumps({"mine": entry, "other": {}}))
    [found] = sources.open_sets(["mine"], str(folder), hub_root=folder / "hub")
    return found


def test_a_set_has_its_files_and_layout(folder: Path) -> None:
    entry = {"file_name": "rows.json", "columns": {"prompt": "q"}, "tags": {"user_tag": "u"}}
    found = describe(folder, entry)
    assert found.layout == RowFormat("alpaca", {"prompt": "q"}, {"user_tag": "u"})
    assert [(Path(file.path).name, file.format) for file in found.files] == [
        ("rows.json", "json list")
    ]


def test_a_folder_is_its_files_in_order(folder: Path) -> None:
    (folder / "many").mkdir()
    for name in ("b.jsonl", "a.jsonl"):
        (folder / "many" / name).write_text(json.dumps(ROW))
    found = describe(folder, {"file_name": "many"})
    assert [Path(file.path).name for file in found.files] == ["a.jsonl", "b.jsonl"]
    (folder / "many" / "c.csv").write_text("a\n")
    with pytest.raises(DataError, match=r"holds files of 2 kinds \(.csv, .jsonl\)"):
        describe(folder, {"file_name": "many"})


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (3, ["mine is 3. Required: an object"]),
        ({}, ["names no data. Required: file_name or hf_hub_url"]),
        ({"file_name": "row.json"}, ["row.json does not exist. Did you mean rows.json?"]),
        ({"file_name": "rows.json", "colums": {}}, ["unknown key 'colums'. Did you mean columns?"]),
        (
            {"file_name": "rows.json", "columns": {"promt": "a"}},
            ["unknown key 'promt'. Did you mean prompt?", "query"],
        ),
        ({"file_name": "rows.json", "columns": {"prompt": 1}}, ["prompt is 1. Required: a name"]),
        ({"file_name": "rows.json", "tags": {"user": "u"}}, ["Did you mean user_tag?"]),
        ({"file_name": "rows.json", "tags": []}, []),
        ({"file_name": "rows.json", "tags": ["a"]}, ["tags=['a']. Required: an object"]),
        ({"file_name": "rows.json", "formatting": "sharegp"}, ["Did you mean sharegpt?"]),
        ({"file_name": "rows.json", "formatting": "opena"}, ["Did you mean openai"]),
        ({"file_name": "rows.json", "ranking": True}, ["ranking: true", "pairs of responses"]),
        ({"file_name": "rows.json", "columns": {"kto_tag": "k"}}, ["names a kto_tag"]),
        ({"file_name": "rows.json", "num_samples": 3}, ["num_samples=3", "not built yet"]),
        ({"script_url": "x"}, ["loading script"]),
        ({"cloud_file_name": "s3://x"}, ["cloud storage are not built yet"]),
        ({"ms_hub_url": "x/y"}, ["another hub (ms_hub_url)"]),
    ],
)
def test_a_wrong_entry_says_what_is_wrong(folder: Path, entry: Any, words: list[str]) -> None:
    if not words:
        describe(folder, entry)
        return
    with pytest.raises(DataError) as error:
        describe(folder, entry)
    for word in [*words, "mine", "dataset_info.json"]:
        assert word in str(error.value)


def test_an_unknown_set_names_the_nearest_and_all(folder: Path) -> None:
    describe(folder, {"file_name": "rows.json"})
    with pytest.raises(DataError, match=r"Did you mean mine\? Required: one of mine, other"):
        sources.open_sets(["mane"], str(folder), hub_root=folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "does not exist"), ("{", "is not JSON"), ("[]", "holds no object")],
)
def test_a_wrong_dataset_info_is_named(folder: Path, content: str | None, words: str) -> None:
    if content is not None:
        (folder / "dataset_info.json").write_text(content)
    with pytest.raises(DataError, match=f"dataset_info.json {words}"):
        sources.open_sets(["mine"], str(folder), hub_root=folder)


def test_a_named_column_must_be_in_some_row(folder: Path) -> None:
    rows = [ROW, ROW, {**ROW, "sytem": "s"}]
    (folder / "rows.json").write_text(json.dumps(rows))
    sources.check_columns(describe(folder, {"file_name": "rows.json"}))
    sources.check_columns(
        describe(folder, {"file_name": "rows.json", "columns": {"system": "sytem"}})
    )
    wrong = describe(folder, {"file_name": "rows.json", "columns": {"system": "system"}})
    with pytest.raises(DataError) as error:
        sources.check_columns(wrong)
    assert "no row has the column 'system'" in str(error.value)
    assert "Did you mean sytem? The rows have instruction, output, sytem" in str(error.value)


def test_a_hub_set_becomes_a_file_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
    (folder / "hub-set").mkdir()
    (folder / "hub-set" / "train.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps(ROW))
    entry = {"hf_hub_url": str(folder / "hub-set"), "split": "train[:1]"}
    [first] = describe(folder, entry).files
    [again] = describe(folder, entry).files
    assert first == again
    assert first.path.startswith(str(folder / "hub"))
    [piece] = sources.files.cut(first, 1 << 20)
    assert list(sources.files.read(piece)) == [ROW]


def test_a_hub_that_does_not_answer_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(path: str, **options: Any) -> None:
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError) as error:
        describe(folder, {"hf_hub_url": "some/set"})
    for word in ("some/set", "Hugging Face hub", "Couldn't reach", "file_name"):
        assert word in str(error.value)


def test_a_variable_that_asks_for_another_hub_goes_before_hugging_face(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    with pytest.raises(DataError, match=r"ms_hub_url.*Or unset USE_MODELSCOPE_HUB for hf_hub_url"):
        describe(folder, {"hf_hub_url": "x/y", "ms_hub_url": "x/z"})
