"""Rows as they are shown, against the prepared data that a run would read."""

import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from tiny import make_model, make_tokenizer

from llmray import cli, hub
from llmray.arguments.loading import load
from llmray.data import prepared
from llmray.errors import DataError
from llmray.render import Options, render

LONG = " ".join(f"word {i}" for i in range(40))
DIALOGUES = [
    [("human", "Hi"), ("gpt", "Hello."), ("human", "Why?"), ("gpt", "Because.")],
    [("human", LONG), ("gpt", "Short.")],
    [("human", "Say it."), ("gpt", LONG), ("human", "And?"), ("gpt", "No more.")],
    [("human", "Ä ö 漢字"), ("gpt", "漢字 [x] ü")],
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMRAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NO_COLOR", raising=False)
    make_tokenizer(tmp_path / "model")
    make_model(tmp_path / "model")
    for path in (tmp_path / "model").glob("*.safetensors"):
        path.unlink()  # nothing here reads weights
    data = tmp_path / "data"
    data.mkdir()
    turns = [
        {"conversations": [{"from": who, "value": text} for who, text in said]}
        for said in DIALOGUES
    ]
    texts = [{"text": f"Text number {i}. " * (i + 1)} for i in range(6)]
    info = {
        "turns": {"file_name": "turns.jsonl", "formatting": "sharegpt"},
        "texts": {"file_name": "texts.jsonl", "columns": {"prompt": "text"}},
    }
    for name, rows in (("turns", turns), ("texts", texts)):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "dataset_info.json").write_text(json.dumps(info))
    return tmp_path


def arguments(folder: Path, **keys):
    base = {
        "model_name_or_path": str(folder / "model"),
        "dataset_dir": str(folder / "data"),
        "dataset": "turns",
        "template": "chatml",
        "cutoff_len": 64,
        "output_dir": str(folder / "out"),
    }
    return load({k: v for k, v in {**base, **keys}.items() if v is not ...}, environ={})


def shown(run, **options):
    target = io.StringIO()
    assert render(run, Options(**options), target=target) == 0
    return target.getvalue()


TEXTS = {"stage": "pt", "dataset": "texts", "template": ...}


@pytest.mark.parametrize("table", ["train", "eval"])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"mask_history": True},
        {"predict_with_generate": True},
        {"train_on_prompt": True, "cutoff_len": 30},
        {"template": ...},
        {**TEXTS, "cutoff_len": 16},
        {**TEXTS, "cutoff_len": 16, "packing": False},
    ],
)
def test_rows_are_those_of_the_prepared_data(folder, keys, table):
    run = arguments(folder, **keys, val_size=2)
    ref = prepared.ensure(run, folder / "model", root=folder / "prepared")
    opened = prepared.open(ref)
    expected = opened.train if table == "train" else opened.eval["eval"]
    text = shown(run, num_rows=len(expected) + 5, table=table, as_json=True)
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == len(expected)
    for row, sample in zip(rows, (expected[i] for i in range(len(expected))), strict=True):
        assert row["input_ids"] == sample.input_ids.tolist()
        labels = np.where(sample.target_mask, sample.input_ids, -100)
        assert row["labels"] == labels.tolist()


def test_the_first_rows_are_the_same_however_many_are_wanted(folder):
    for keys in ({}, {**TEXTS, "cutoff_len": 16}):
        run = arguments(folder, **keys)
        everything = shown(run, num_rows=9, as_json=True).splitlines()
        assert shown(run, num_rows=2, as_json=True).splitlines() == everything[:2]


def test_targets_stand_in_brackets(folder):
    text = shown(arguments(folder), num_rows=1)
    assert text == (
        "--- row 1 of train: 36 tokens, 15 of them targets\n"
        f"    {folder}/data/turns.jsonl, row 1 (line 1)\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[Hello.<|im_end|>\n]"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n[Because.<|im_end|>\n]\n\n"
    ).replace("36 tokens, 15", text.split(": ")[1].split(" of")[0])
    masked = shown(arguments(folder, mask_history=True), num_rows=1)
    assert "\nHello.<|im_end|>\n<" in masked
    assert "[Because.<|im_end|>\n]" in masked


def test_what_the_cutoff_takes_out_is_said_in_place(folder):
    run = arguments(folder, cutoff_len=24, dataset="turns")
    text = shown(run, num_rows=2)
    [row] = [json.loads(r) for r in shown(run, num_rows=2, as_json=True).splitlines()[1:]]
    assert len(row["input_ids"]) == 24
    [cut] = row["cuts"]
    assert f"cutoff_len took {cut['tokens']} of {24 + cut['tokens']} tokens out" in text
    end = "<|im_end|>\n<|im_start|>assistant\n[Short.<|im_end|>\n]"
    assert f"<<{cut['tokens']} tokens cut>>{end}" in text


def test_a_mixed_table_is_shown_in_its_order(folder):
    text = {"stage": "pt", "template": ..., "packing": False, "mix_strategy": "interleave_over"}
    mixed = arguments(folder, dataset="texts,more", **text)
    info = folder / "data" / "dataset_info.json"
    sets = json.loads(info.read_text())
    sets["more"] = {**sets["texts"], "num_samples": 2}
    info.write_text(json.dumps(sets))
    rows = [json.loads(row) for row in shown(mixed, num_rows=5, as_json=True).splitlines()]
    sources = [row["source"].partition(", ")[2] for row in rows]
    assert [sources[i] for i in (0, 2, 4)] == [f"row {i} (line {i})" for i in (1, 2, 3)]
    assert len({sources[1], sources[3]}) == 2


def test_targets_are_green_on_a_terminal_unless_no_color_is_set(folder, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def seen():
        target = Terminal()
        render(arguments(folder), Options(num_rows=1), target=target)
        return target.getvalue()

    assert "\x1b[32mHello.<|im_end|>\n\x1b[0m" in seen()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "[Hello.<|im_end|>\n]" in seen()


def test_ids_are_one_token_a_line(folder):
    run = arguments(folder)
    text = shown(run, num_rows=1, ids=True)
    [row] = [json.loads(line) for line in shown(run, num_rows=1, as_json=True).splitlines()]
    lines = text.splitlines()[2:-1]
    assert [int(line.split()[1]) for line in lines] == row["input_ids"]
    assert [line.endswith("]") for line in lines] == [label != -100 for label in row["labels"]]
    assert lines[0].split() == ["0", "1", '"<|im_start|>"']


def test_a_block_names_the_texts_that_it_holds(folder):
    text = shown(arguments(folder, **TEXTS, cutoff_len=48), num_rows=3, as_json=True)
    rows = [json.loads(line) for line in text.splitlines()]
    everything = "".join(row["text"] for row in rows)
    for row in rows:
        for number in range(6):
            is_named = f"texts.jsonl, row {number + 1} " in row["source"]
            if f"number {number}." in row["text"]:
                assert is_named
    assert "number 2." in everything


def test_rows_without_a_target_are_said(folder, caplog):
    run = arguments(folder, cutoff_len=1)
    with caplog.at_level(logging.WARNING, "llmray"), pytest.raises(DataError, match="No row is"):
        shown(run, num_rows=1)
    assert "left out" in caplog.text
    assert "turns.jsonl, row 1 (line 1)" in caplog.text


def test_a_wrong_row_is_said_as_in_a_build(folder):
    with open(folder / "data" / "turns.jsonl", "w") as file:
        file.write('{"conversations": []}\n')
    with pytest.raises(DataError, match=r"turns\.jsonl, row 1 \(line 1\): .* is empty"):
        shown(arguments(folder))


def test_there_may_be_no_rows_to_evaluate_on(folder):
    with pytest.raises(DataError, match="Required for --eval: val_size or eval_dataset"):
        shown(arguments(folder), table="eval")


def test_a_run_that_only_evaluates_has_its_rows_in_eval(folder):
    run = arguments(folder, dataset=..., eval_dataset="turns")
    assert "Because." in shown(run, table="eval", num_rows=1)
    with pytest.raises(DataError, match="Write it, or --eval for the rows to evaluate on"):
        shown(run)


def test_no_weights_are_fetched_from_a_hub(folder, monkeypatch):
    asked = {}

    def download(name, **settings):
        asked.update(settings)
        return str(folder / "model")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    shown(arguments(folder, model_name_or_path="some/model"), num_rows=1)
    assert "*.safetensors" in asked["ignore_patterns"]
    hub.resolve("some/model", arguments(folder).model)
    assert "*.safetensors" not in asked["ignore_patterns"]


def test_the_command(folder, capsys, own_console):
    path = folder / "run.yaml"
    arguments(folder).save(path)
    assert cli.main(["render", str(path), "--rows", "2", "--json", "cutoff_len=30"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2
    assert set(rows[0]) == {"text", "input_ids", "labels", "source", "cuts"}
    assert max(len(row["input_ids"]) for row in rows) == 30
    assert cli.main(["render", str(path), "--rows", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err
