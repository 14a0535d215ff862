"""Pairs and judged answers through prepared data: built, ordered, counted, shown."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmray.arguments.loading import load, replace
from llmray.arguments.run import RunArguments
from llmray.data import planning, prepared, spoken
from llmray.data.mismatched import JudgedTable
from llmray.errors import DataError
from llmray.render import Options, render

PAIRS = [
    {"instruction": f"question {i}", "chosen": f"good answer {i}", "rejected": f"bad {i}"}
    for i in range(9)
]
PAIRS[3]["rejected"] = ["worse", "worst", "good answer 3"]  # type: ignore[assignment]
PAIRS[5]["rejected"] = PAIRS[5]["chosen"]
JUDGED = [
    {"instruction": f"question {i}", "output": f"answer {i}", "kto_tag": i % 3 == 0}
    for i in range(7)
]


LABELS = {
    "pairs": [f"good answer {i}" for i in range(9)],
    "judged": [f"answer {i}" for i in range(7)],
    "talks": [None, "d"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pairs.json").write_text(json.dumps(PAIRS))
    (tmp_path / "judged.json").write_text(json.dumps(JUDGED))
    (tmp_path / "bad.json").write_text(json.dumps([{**PAIRS[0], "rejected": ""}, PAIRS[1]]))
    info = {
        "pairs": {"file_name": "pairs.json", "ranking": True},
        "drawn": {"file_name": "pairs.json", "ranking": True, "num_samples": 14},
        "bad": {"file_name": "bad.json", "ranking": True},
        "judged": {"file_name": "judged.json", "columns": {"kto_tag": "kto_tag"}},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    return tmp_path


def arguments(folder: Path, **keys: Any) -> RunArguments:
    given = {
        "model_name_or_path": "tiny",
        "stage": "dpo",
        "do_train": True,
        "dataset": "pairs",
        "template": "chatml",
        "dataset_dir": str(folder),
        "output_dir": str(folder / "out"),
        "cutoff_len": 200,
    }
    return load({**given, **keys}, environ={})


def rejected_texts(table: Any, tokenizer: Any) -> list[str]:
    found = []
    for index in range(len(table)):
        row = table[index]
        text = tokenizer.decode(row.input_ids[row.starts[1] :])
        found.append(text.partition("<|im_end|>")[0])
    return found


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(tiny_llama_dir))


def test_several_rejected_are_several_rows_and_equal_answers_none(
    folder: Path, tiny_llama_dir: Path, tokenizer: Any
) -> None:
    """11 pairs of 9 rows; of row 5 the one pair and of row 3 the last are equal."""
    ref = prepared.ensure(arguments(folder), tiny_llama_dir, root=folder / "root")
    table = prepared.open(ref).train
    assert rejected_texts(table, tokenizer) == [
        *("bad 0", "bad 1", "bad 2", "worse", "worst", "bad 4", "bad 6", "bad 7", "bad 8")
    ]
    assert ref.num_train == 9
    row = table.samples(3)[0]
    assert row.starts is not None
    assert "good answer 3" in tokenizer.decode(row.input_ids[row.starts[0] : row.starts[1]])
    counts = prepared._metadata(ref.path)["counts"]
    assert (counts["read"], counts["equal"]) == (11, 2)
    assert "row 4" in counts["firsts"]["equal"]


def test_rows_drawn_anew_bring_all_their_pairs(
    folder: Path, tiny_llama_dir: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 9 rows 14 are drawn: each once or twice, row 5 never stays."""
    drawn = arguments(folder, dataset="drawn")
    ref = prepared.ensure(drawn, tiny_llama_dir, root=folder / "root")
    table = prepared.open(ref).train
    texts = rejected_texts(table, tokenizer)
    assert {texts.count(word) for word in texts} == {1, 2}
    assert set(texts) == {"worse", "worst", *(f"bad {i}" for i in (0, 1, 2, 4, 6, 7, 8))}
    places = [i for i, text in enumerate(texts) if text == "worse"]
    assert [texts[place + 1] for place in places] == ["worst"] * len(places)
    monkeypatch.setattr(planning, "LEAST_SHARD_BYTES", 100)
    small = prepared.ensure(drawn, tiny_llama_dir, root=folder / "other")
    assert rejected_texts(prepared.open(small).train, tokenizer) == texts
    target = io.StringIO()
    monkeypatch.setenv("LLMRAY_CACHE", str(folder / "cache"))
    here = replace(drawn, model_name_or_path=str(tiny_llama_dir))
    assert render(here, Options(num_rows=4, as_json=True), target=target) == 0
    rendered = [json.loads(line) for line in target.getvalue().splitlines()]
    ids = [table.samples(i)[0].input_ids.tolist() for i in range(4)]
    assert [row["input_ids"] for row in rendered] == ids


def test_held_out_pairs_of_one_prompt_stay_together(folder: Path, tiny_llama_dir: Path) -> None:
    ref = prepared.ensure(arguments(folder, val_size=4), tiny_llama_dir, root=folder / "root")
    opened = prepared.open(ref)
    prompts = [
        {tuple(row.input_ids[: row.starts[0]].tolist()) for row in map(table.__getitem__, range(n))}
        for table, n in ((opened.train, len(opened.train)), (opened.eval["eval"], ref.num_eval))
    ]
    assert not prompts[0] & prompts[1]


def test_stages_of_pairs_share_their_data(folder: Path, tiny_llama_dir: Path) -> None:
    keys = [
        prepared.key_of(arguments(folder, stage=stage), tiny_llama_dir, root=folder / "root")
        for stage in ("dpo", "rm")
    ]
    assert keys[0] == keys[1]


def test_a_pair_without_words_is_a_bad_row(folder: Path, tiny_llama_dir: Path) -> None:
    with pytest.raises(DataError, match=r"bad\.json.*row 1.*'rejected' is empty"):
        prepared.ensure(arguments(folder, dataset="bad"), tiny_llama_dir, root=folder / "root")
    skipping = arguments(folder, dataset="bad", bad_rows="skip")
    assert prepared.ensure(skipping, tiny_llama_dir, root=folder / "root").num_train == 1


@pytest.mark.parametrize("dataset", ["pairs", "judged", "talks"])
def test_prompts_alone_are_rows_of_any_set(
    folder: Path, tiny_llama_dir: Path, tokenizer: Any, dataset: str
) -> None:
    talk = [
        {"from": "human", "value": "a"},
        {"from": "gpt", "value": "b"},
        {"from": "human", "value": "c"},
    ]
    talks = [{"conversations": talk}, {"conversations": [*talk, {"from": "gpt", "value": "d"}]}]
    (folder / "talks.json").write_text(json.dumps(talks))
    info = json.loads((folder / "dataset_info.json").read_text())
    info["talks"] = {"file_name": "talks.json", "formatting": "sharegpt"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    run = arguments(folder, stage="ppo", dataset=dataset, reward_model="r")
    table: Any = prepared.open(prepared.ensure(run, tiny_llama_dir, root=folder / "root")).train
    assert len(table) == {"pairs": 9, "judged": 7, "talks": 2}[dataset]
    text = tokenizer.decode(table[0].input_ids)
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert not table[0].target_mask.any()
    said = [spoken.read(table[row].said) for row in range(len(table))]
    assert all(one.messages[-1].role == "user" for one in said)
    assert all(one.messages[-1].content in text for one in said[:1])
    labels = [one.label and one.label.content for one in said]
    assert labels == LABELS[dataset]
    if dataset == "talks":
        assert table[0].input_ids.tolist() == table[1].input_ids.tolist()
        assert "b<|im_end|>" in text


@pytest.mark.parametrize("batch_size", [2, 1000])
def test_answers_to_other_prompts_do_not_depend_on_how_data_is_prepared(
    folder: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    run = arguments(folder, stage="kto", dataset="judged", preprocessing_batch_size=batch_size)
    monkeypatch.setattr(planning, "LEAST_SHARD_BYTES", 50 * batch_size)
    table = prepared.open(prepared.ensure(run, tiny_llama_dir, root=folder / "root")).train
    assert isinstance(table, JudgedTable)
    assert (len(table), table.num_wanted) == (7, 3)
    for index in range(7):
        row, before = table[index], table[(index - 1) % 7]
        assert row.mismatched is not None
        assert row.starts is not None
        assert before.starts is not None
        prompt, answer = row.input_ids[: row.starts[0]], before.input_ids[before.starts[0] :]
        assert np.array_equal(row.mismatched.input_ids, np.concatenate([prompt, answer]))


@pytest.mark.parametrize(
    ("stage", "dataset", "words"),
    [
        ("sft", "pairs", "it holds pairs of responses"),
        ("dpo", "judged", "no pairs of responses"),
        ("kto", "pairs", "it holds pairs of responses"),
        ("sft", "judged", "names a kto_tag"),
    ],
)
def test_sets_of_other_stages_are_refused(
    folder: Path, tiny_llama_dir: Path, stage: str, dataset: str, words: str
) -> None:
    run = arguments(folder, stage=stage, dataset=dataset)
    with pytest.raises(DataError, match=words):
        prepared.ensure(run, tiny_llama_dir, root=folder / "root")
