import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmray import store
from llmray.arguments.loading import load
from llmray.arguments.run import RunArguments
from llmray.data import planning, prepared, workers
from llmray.errors import DataError, StoreError

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "does",
    "not",
    "mind",
    "what",
    "is",
    "it",
]


def write_rows(folder: Path, count: int = 40) -> None:
    draw = np.random.default_rng(0)
    rows = [
        {
            "instruction": f"{i} " + " ".join(draw.choice(WORDS, 5)),
            "output": " ".join(draw.choice(WORDS, draw.integers(1, 40))),
        }
        for i in range(count)
    ]
    lines = "\n".join(json.dumps(row) for row in rows)
    (folder / "rows.jsonl").write_text(lines + "\n")
    (folder / "texts.txt").write_text("\n".join(row["output"] for row in rows))
    (folder / "other.json").write_text(json.dumps(rows[:7]))
    info = {
        "rows": {"file_name": "rows.jsonl"},
        "texts": {"file_name": "texts.txt", "columns": {"prompt": "text"}},
        "other": {"file_name": "other.json"},
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path)
    for path in tmp_path.iterdir():  # older than what may still be changing
        os.utime(path, (1e9, 1e9))
    return tmp_path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "prepared"


def arguments(folder: Path, **keys: Any) -> RunArguments:
    given = {
        "model_name_or_path": "tiny",
        "stage": "sft",
        "do_train": True,
        "dataset": "rows",
        "dataset_dir": str(folder),
        "output_dir": str(folder / "out"),
        "cutoff_len": 64,
    }
    return load({**given, **keys})


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "LEAST_SHARD_BYTES", 700)


def files_of(path: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(Path(path).glob("*.arrow"))}


def copied(model: Path, target: Path) -> Path:
    target.mkdir()
    for path in model.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
        os.utime(target / path.name, (1e9, 1e9))
    return target


def test_rows_are_prepared_once_and_found_again(
    folder: Path, root: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copied(tiny_llama_dir, folder / "model")
    ref = prepared.ensure(arguments(folder), model, root=root)
    table = prepared.open(ref)
    assert (ref.num_train, ref.num_eval, len(table.train), table.eval) == (40, 0, 40, {})
    assert ref.num_tokens == table.train.num_tokens == table.train.lengths.sum()
    assert ref.num_targets == table.train.target_counts.sum()
    sample = table.train[3]
    assert not sample.target_mask[0]
    assert sample.target_mask.sum() == table.train.target_counts[3]
    assert pickle.loads(pickle.dumps(ref)) == ref
    assert json.loads(json.dumps(ref.fingerprint)) == ref.fingerprint

    def not_again(*args: Any) -> None:
        raise AssertionError("a second run reads and builds nothing")

    monkeypatch.setattr("hashlib.file_digest", not_again)
    monkeypatch.setattr(prepared, "_build", not_again)
    assert prepared.ensure(arguments(folder), model, root=root) == ref


def test_a_second_run_loads_no_tokenizer_and_no_torch(
    folder: Path, root: Path, tiny_llama_dir: Path
) -> None:
    given = arguments(folder)
    ref = prepared.ensure(given, tiny_llama_dir, root=root)
    given.save(folder / "run.yaml")
    code = (
        "import sys; from pathlib import Path; from llmray.arguments.loading import load\n"
        "from llmray.data import prepared\n"
        f"ref = prepared.ensure(load({str(folder / 'run.yaml')!r}), "
        f"{str(tiny_llama_dir)!r}, root=Path({str(root)!r}))\n"
        "assert len(prepared.open(ref).train[0].input_ids)\n"
        "heavy = ('torch', 'transformers', 'datasets', 'pandas')\n"
        "print(ref.key, *(name for name in heavy if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [ref.key]


# --- the content key --------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Path], Any]] = {
    "cutoff_len": lambda folder: {"cutoff_len": 65},
    "template": lambda folder: {"template": "qwen"},
    "default_system": lambda folder: {"default_system": "S"},
    "truncation": lambda folder: {"truncation": "drop"},
    "split_special_tokens": lambda folder: {"split_special_tokens": True},
    "add_tokens": lambda folder: {"add_tokens": "wug"},
    "add_special_tokens": lambda folder: {"add_special_tokens": "<call>"},
    "bad_rows": lambda folder: {"bad_rows": "skip"},
    "train_on_prompt": lambda folder: {"train_on_prompt": True},
    "mask_history": lambda folder: {"mask_history": True},
    "max_samples": lambda folder: {"max_samples": 10},
    "val_size": lambda folder: {"val_size": 0.1},
    "dataset": lambda folder: {"dataset": "rows,other"},
    "num_samples": lambda folder: (folder / "dataset_info.json").write_text(
        json.dumps({"rows": {"file_name": "rows.jsonl", "num_samples": 7}})
    ),
    "eval_dataset": lambda folder: {"eval_dataset": "other"},
    "stage": lambda folder: {"stage": "pt"},
    "bytes of a file": lambda folder: append(folder / "rows.jsonl", '{"instruction": "a"}'),
    "layout": lambda folder: (folder / "dataset_info.json").write_text(
        json.dumps({"rows": {"file_name": "rows.jsonl", "columns": {"query": "output"}}})
    ),
    "tokenizer": lambda folder: append(folder / "model" / "tokenizer.json", " "),
    "model type": lambda folder: (folder / "model" / "config.json").write_text(
        '{"model_type": "qwen2"}'
    ),
}
INDIFFERENT: dict[str, Callable[[Path], Any]] = {
    "nothing": lambda folder: {},
    "seed": lambda folder: {"seed": 7},
    "learning_rate": lambda folder: {"learning_rate": 1.0},
    "resize_vocab": lambda folder: {"resize_vocab": True},
    "preprocessing_batch_size": lambda folder: {"preprocessing_batch_size": 7},
    "preprocessing_num_workers": lambda folder: {"preprocessing_num_workers": 3},
    "overwrite_cache": lambda folder: {"overwrite_cache": True},
    "output_dir": lambda folder: {"output_dir": "elsewhere"},
    "time of change": lambda folder: os.utime(folder / "rows.jsonl"),
    "name of a file": lambda folder: rename(folder, "rows.jsonl", "renamed.jsonl"),
    "weights": lambda folder: (folder / "model" / "model.safetensors").write_bytes(b"new"),
}


def append(path: Path, text: str) -> None:
    with open(path, "a") as file:
        file.write(text)


def rename(folder: Path, old: str, new: str) -> None:
    (folder / old).rename(folder / new)
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace(old, new))


def keys_before_and_after(
    folder: Path, root: Path, model: Path, change: Callable[[Path], Any]
) -> tuple[str, str]:
    place = copied(model, folder / "model")
    before = prepared.key_of(arguments(folder), place, root=root)
    changed = change(folder)
    given = arguments(folder, **(changed if isinstance(changed, dict) else {}))
    return before, prepared.key_of(given, place, root=root)


@pytest.mark.parametrize("name", CHANGES)
def test_what_decides_a_token_changes_the_key(
    folder: Path, root: Path, tiny_llama_dir: Path, name: str
) -> None:
    before, after = keys_before_and_after(folder, root, tiny_llama_dir, CHANGES[name])
    assert before != after


@pytest.mark.parametrize("name", INDIFFERENT)
def test_what_decides_no_token_leaves_the_key(
    folder: Path, root: Path, tiny_llama_dir: Path, name: str
) -> None:
    before, after = keys_before_and_after(folder, root, tiny_llama_dir, INDIFFERENT[name])
    assert before == after


def test_the_seed_matters_where_rows_are_set_aside(
    folder: Path, root: Path, tiny_llama_dir: Path
) -> None:
    given = [arguments(folder, val_size=2, seed=seed) for seed in (1, 2)]
    assert len({prepared.key_of(each, tiny_llama_dir, root=root) for each in given}) == 2


def test_the_style_of_pt_matters_to_pt(folder: Path, root: Path, tiny_llama_dir: Path) -> None:
    keys = {
        prepared.key_of(
            arguments(folder, stage="pt", dataset="texts", packing=packing),
            tiny_llama_dir,
            root=root,
        )
        for packing in (None, True, False)
    }
    assert len(keys) == 2


# --- what is built ----------------------------------------------------------------------------


def test_the_result_does_not_depend_on_processes_or_batches(
    folder: Path, tmp_path: Path, tiny_llama_dir: Path, small_shards: None
) -> None:
    found = []
    for number, keys in enumerate(
        (
            {"preprocessing_batch_size": 1000},
            {"preprocessing_batch_size": 3},
            {"preprocessing_num_workers": 2, "preprocessing_batch_size": 7},
        )
    ):
        given = arguments(folder, val_size=0.2, **keys)
        ref = prepared.ensure(given, tiny_llama_dir, root=tmp_path / str(number))
        found.append((ref.key, files_of(ref.path)))
        assert len(found[-1][1]) > 6
    assert found[0] == found[1] == found[2]


def test_shards_may_be_built_in_any_order(
    folder: Path, root: Path, tmp_path: Path, tiny_llama_dir: Path, small_shards: None
) -> None:
    given = arguments(folder)
    plan = pickle.loads(pickle.dumps(prepared.plan(given, tiny_llama_dir, root=root)))
    Path(plan.staging).mkdir(parents=True)
    with pytest.raises(StoreError, match=r"Shard 0 of \d+ is not built"):
        prepared.commit(plan)
    for index in reversed(range(len(plan.shards))):
        prepared.build_shard(plan, index)
    ref = prepared.commit(plan)
    whole = prepared.ensure(given, tiny_llama_dir, root=tmp_path / "again")
    assert files_of(ref.path) == files_of(whole.path)


@pytest.mark.parametrize(("val_size", "count"), [(0.1, 4), (3, 3), (0.11, 5)])
def test_rows_set_aside_are_taken_from_training(
    folder: Path, root: Path, tiny_llama_dir: Path, small_shards: None, val_size: Any, count: int
) -> None:
    whole = prepared.open(prepared.ensure(arguments(folder), tiny_llama_dir, root=root))
    ref = prepared.ensure(arguments(folder, val_size=val_size), tiny_llama_dir, root=root)
    parts = prepared.open(ref)
    assert (ref.num_train, ref.num_eval, len(parts.eval["eval"])) == (40 - count, count, count)
    tables = (parts.train, parts.eval["eval"])
    rows = [tuple(t[i].input_ids.tolist()) for t in tables for i in range(len(t))]
    assert sorted(rows) == sorted(tuple(whole.train[i].input_ids.tolist()) for i in range(40))
    # in the order of the data, not in that of the draw
    order = {tuple(whole.train[i].input_ids.tolist()): i for i in range(40)}
    places = [order[tuple(parts.train[i].input_ids.tolist())] for i in range(40 - count)]
    assert places == sorted(places)


def test_too_many_rows_set_aside(folder: Path, root: Path, tiny_llama_dir: Path) -> None:
    with pytest.raises(DataError, match="val_size=40 sets 40 rows aside, and there are 40"):
        prepared.ensure(arguments(folder, val_size=40), tiny_llama_dir, root=root)


def test_an_evaluation_set_and_a_head(folder: Path, root: Path, tiny_llama_dir: Path) -> None:
    given = arguments(folder, dataset="other,rows", eval_dataset="other", max_samples=5)
    ref = prepared.ensure(given, tiny_llama_dir, root=root)
    table = prepared.open(ref)
    assert (len(table.train), len(table.eval["eval"])) == (10, 5)
    for index in range(5):
        assert np.array_equal(table.train[index].input_ids, table.eval["eval"][index].input_ids)


def test_rows_are_prompts_where_generated_responses_are_judged(
    folder: Path, root: Path, tiny_llama_dir: Path, small_shards: None
) -> None:
    """Rows to train on stay as they are; those to evaluate on end with their only target."""
    keys = {"val_size": 6, "mask_history": True}
    plain = arguments(folder, **keys)
    judged = arguments(folder, **keys, do_predict=True, predict_with_generate=True)
    before, after = (
        prepared.open(prepared.ensure(run, tiny_llama_dir, root=root)) for run in (plain, judged)
    )
    assert before.path != after.path
    assert len(after.eval["eval"]) == 6
    for table in (before.train, after.train):
        assert len(table) == 34
    for index in range(34):
        assert np.array_equal(before.train[index].input_ids, after.train[index].input_ids)
    for index in range(6):
        theirs, ours = before.eval["eval"][index], after.eval["eval"][index]
        start = int(np.argmax(ours.target_mask))
        assert ours.target_mask[start:].all()
        if len(theirs.input_ids) < 64:  # nothing was cut: the same tokens, the same response
            assert np.array_equal(theirs.input_ids, ours.input_ids)
            assert np.array_equal(theirs.target_mask, ours.target_mask)


def test_texts_are_laid_into_blocks_without_losing_a_token(
    folder: Path, root: Path, tiny_llama_dir: Path, small_shards: None
) -> None:
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(tiny_llama_dir)
    texts = (folder / "texts.txt").read_text().split("\n")
    expected = [token for text in texts for token in [*own.encode(text), own.eos_token_id]]
    ref = prepared.ensure(arguments(folder, stage="pt", dataset="texts"), tiny_llama_dir, root=root)
    table = prepared.open(ref).train
    blocks = [table[i] for i in range(len(table))]
    assert [token for block in blocks for token in block.input_ids.tolist()] == expected
    assert [len(block.input_ids) for block in blocks[:-1]] == [64] * (len(blocks) - 1)
    assert ref.num_train == len(table) == -(-len(expected) // 64)
    assert ref.num_targets == len(expected) - len(table) == table.target_counts.sum()


def test_texts_that_stand_alone_are_cut_and_counted(
    folder: Path, root: Path, tiny_llama_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = arguments(folder, stage="pt", dataset="texts", packing=False, cutoff_len=20)
    with caplog.at_level("INFO", logger="llmray"):
        ref = prepared.ensure(given, tiny_llama_dir, root=root)
    table = prepared.open(ref).train
    assert len(table) == 40
    cut = int((table.lengths == 20).sum())
    assert 0 < cut < 40
    said = [line for line in caplog.messages if line.startswith("data prepared")]
    assert len(said) == 1
    assert "rows cut to cutoff_len" in said[0]


def test_rows_without_a_response_left_are_said_and_left_out(
    folder: Path, root: Path, tiny_llama_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"instruction": "dog " * 90, "output": "x"}, {"instruction": "a", "output": "b"}]
    (folder / "other.json").write_text(json.dumps(rows))
    given = arguments(folder, dataset="other", cutoff_len=3, template="chatml")
    with pytest.raises(DataError, match="No row is left to train on: of 2 rows, 2 have no"):
        prepared.ensure(given, tiny_llama_dir, root=root)
    long_enough = arguments(folder, dataset="other", cutoff_len=32, template="chatml")
    prepared.ensure(long_enough, tiny_llama_dir, root=root)
    # structure: 13 tokens around a prompt; 10 are enough for the response in the other way
    with_middle = arguments(
        folder, dataset="other", cutoff_len=10, template="chatml", truncation="llamafactory"
    )
    ref = prepared.ensure(with_middle, tiny_llama_dir, root=root)
    assert 1 <= ref.num_train <= 2


# --- orders of tables -------------------------------------------------------------------------


def texts_of(path: Path | str, model: Path, table: str = "train") -> list[str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    opened = prepared.open(path)
    rows = opened.train if table == "train" else opened.eval[table]
    return [tokenizer.decode(rows[i].input_ids) for i in range(len(rows))]


def write_letters(folder: Path, **entry: Any) -> None:
    """Sets a of 6 rows and b of 3, whose rows are a0, a1, ...; of a, row 2 is empty."""
    info = {}
    for name, count in (("a", 6), ("b", 3)):
        rows = [f"{name}{i}" for i in range(count)]
        texts = [{"text": "" if row == "a2" else row} for row in rows]
        (folder / f"{name}.json").write_text(json.dumps(texts))
        info[name] = {"file_name": f"{name}.json", "columns": {"prompt": "text"}, **entry}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def letters(folder: Path, root: Path, model: Path, **keys: Any) -> list[str]:
    given = arguments(folder, stage="pt", dataset="a,b", packing=False, **keys)
    ref = prepared.ensure(given, model, root=root)
    return [text.removesuffix("<|im_end|>") for text in texts_of(ref.path, model)]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("concat", "a0 a1 a3 a4 a5 b0 b1 b2"),
        ("interleave_under", "a0 b0 a1 b1 b2"),
        ("interleave_over", "a0 b0 a1 b1 b2 a3 b0 a4 b1 a5 b2"),
        ("interleave_once", "a0 b0 a1 b1 b2 a3 a4 a5"),
    ],
)
@pytest.mark.parametrize("num_workers", [1, 2])
def test_sets_are_mixed_whatever_the_processes(
    folder: Path,
    root: Path,
    tiny_llama_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
    expected: str,
    num_workers: int,
) -> None:
    monkeypatch.setattr(planning, "LEAST_SHARD_BYTES", 30)
    write_letters(folder)
    keys = {"mix_strategy": strategy, "preprocessing_num_workers": num_workers}
    assert letters(folder, root, tiny_llama_dir, **keys) == expected.split()


def test_blocks_are_laid_over_the_rows_as_they_are_mixed(
    folder: Path, root: Path, tiny_llama_dir: Path
) -> None:
    write_letters(folder)
    given = arguments(
        folder, stage="pt", dataset="a,b", cutoff_len=7, mix_strategy="interleave_under"
    )
    ref = prepared.ensure(given, tiny_llama_dir, root=root)
    text = "".join(texts_of(ref.path, tiny_llama_dir))
    assert text == "".join(f"{row}<|im_end|>" for row in ["a0", "b0", "a1", "b1", "b2"])


def test_rows_are_drawn_and_what_is_not_drawn_is_not_read(
    folder: Path, root: Path, tiny_llama_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_letters(folder, num_samples=4)
    with caplog.at_level("INFO", logger="llmray"):
        found = letters(folder, root, tiny_llama_dir)
    again = letters(folder, root, tiny_llama_dir, seed=7)
    # 4 of a, of which one may be empty; b has 3 rows, so that one comes twice
    of_b = [text for text in found if text.startswith("b")]
    assert sorted(set(of_b)) == ["b0", "b1", "b2"]
    assert len(of_b) == 4
    assert len({text for text in found if text.startswith("a")}) == len(found) - 4 in (3, 4)
    assert "2 rows not drawn; 1 rows drawn again" in caplog.messages[0]
    assert found != again
    assert letters(folder, root, tiny_llama_dir) == found
    head = letters(folder, root, tiny_llama_dir, max_samples=2)
    assert len(head) in (3, 4)
    assert [text for text in head if text.startswith("b")] == of_b[:2]


def test_a_wrong_row_that_is_not_drawn_spoils_nothing(
    folder: Path, root: Path, tiny_llama_dir: Path
) -> None:
    write_letters(folder)
    rows = [{"text": f"a{i}"} if i < 3 else 5 for i in range(6)]
    (folder / "a.json").write_text(json.dumps(rows))
    mixed = letters(folder, root, tiny_llama_dir, mix_strategy="interleave_under")
    assert mixed == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_no_row_is_both_trained_and_evaluated(
    folder: Path, root: Path, tiny_llama_dir: Path
) -> None:
    """Though interleave_over draws those of b twice."""
    write_letters(folder)
    keys = {"mix_strategy": "interleave_over", "val_size": 3}
    given = arguments(folder, stage="pt", dataset="a,b", packing=False, **keys)
    path = prepared.ensure(given, tiny_llama_dir, root=root).path
    train = texts_of(path, tiny_llama_dir)
    held_out = texts_of(path, tiny_llama_dir, "eval")
    assert not set(train) & set(held_out)
    assert len(set(train) | set(held_out)) == 8
    assert len(held_out) == len(set(held_out)) in (2, 3)


def test_ids_that_come_twice_are_bad_rows(
    folder: Path, root: Path, tiny_llama_dir: Path, small_shards: None
) -> None:
    rows = [{"instruction": "a", "output": "b", "id": i % 5} for i in range(7)]
    rows.append({"instruction": "a", "output": "b"})
    (folder / "other.json").write_text(json.dumps(rows))
    info = {"other": {"file_name": "other.json", "columns": {"id": "id"}}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(DataError) as error:
        prepared.ensure(arguments(folder, dataset="other"), tiny_llama_dir, root=root)
    for word in ("row 6 (line 1): 'id' is 0, as in an earlier row", "row 7 (line 1): 'id' is 1"):
        assert word in str(error.value)
    given = arguments(folder, dataset="other", bad_rows="skip")
    assert prepared.ensure(given, tiny_llama_dir, root=root).num_train == 6


def test_ten_wrong_rows_are_said_at_once(
    folder: Path, root: Path, tiny_llama_dir: Path, small_shards: None
) -> None:
    lines = (folder / "rows.jsonl").read_text().splitlines()
    for number in range(3, 39, 3):
        lines[number] = '{"instruction": 5}' if number % 2 else "{"
    (folder / "rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError) as error:
        prepared.ensure(arguments(folder), tiny_llama_dir, root=root)
    said = str(error.value).splitlines()
    assert len(said) == 12
    assert "rows.jsonl, row 4 (line 4): 'instruction' is int 5" in said[1]
    assert "rows.jsonl, row 7 (line 7): malformed JSON" in said[2]
    assert "rows.jsonl, row 31 (line 31): " in said[10]
    assert store.list_committed(root) == []


def test_an_end_that_is_not_in_the_text_is_learned_from_prepared_data(
    folder: Path, root: Path, tiny_llama_dir: Path
) -> None:
    """Template falcon: Q1 A1 Q2 A2 with the end token once, learned after both answers."""
    turns = [
        {"from": ("human", "gpt")[i % 2], "value": text}
        for i, text in enumerate(("what is it", "a fox", "and it does", "not mind"))
    ]
    (folder / "other.json").write_text(json.dumps([{"conversations": turns}]))
    info = {"other": {"file_name": "other.json", "formatting": "sharegpt"}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    keys = {"dataset": "other", "template": "falcon"}
    [sample] = prepared.open(
        prepared.ensure(arguments(folder, **keys), tiny_llama_dir, root=root)
    ).train
    assert sample.input_ids.tolist().count(2) == 1
    assert sample.input_ids[-1] == 2
    assert sample.target_ids().tolist().count(2) == 2
    masked = prepared.ensure(
        arguments(folder, **keys, mask_history=True), tiny_llama_dir, root=root
    )
    assert prepared.open(masked).train[0].target_ids().tolist().count(2) == 1
    with pytest.raises(DataError, match="train_on_prompt=true with template=falcon"):
        prepared.ensure(arguments(folder, **keys, train_on_prompt=True), tiny_llama_dir, root=root)


def test_a_row_that_the_template_cannot_write_has_its_place(
    folder: Path, root: Path, tiny_llama_dir: Path
) -> None:
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "look_up"}'},
    ]
    (folder / "other.json").write_text(json.dumps([{"conversations": turns}]))
    info = {"other": {"file_name": "other.json", "formatting": "sharegpt"}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(
        DataError, match=r"other.json, row 1 \(line 1\): .*does not write the calls"
    ):
        prepared.ensure(arguments(folder, dataset="other"), tiny_llama_dir, root=root)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"dataset": "row"}, "row is no set of"),
        ({"dataset_dir": "/nowhere"}, "/nowhere/dataset_info.json does not exist"),
    ],
)
def test_what_is_not_there_is_said_before_anything_is_loaded(
    folder: Path, root: Path, tiny_llama_dir: Path, keys: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError) as error:
        prepared.key_of(arguments(folder, **keys), tiny_llama_dir, root=root)
    assert words in str(error.value)


def test_an_empty_file_is_named(folder: Path, root: Path, tiny_llama_dir: Path) -> None:
    (folder / "rows.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"rows has no rows: .*rows\.jsonl\. Required: at least"):
        prepared.ensure(arguments(folder), tiny_llama_dir, root=root)


def test_flipped_bits_are_found(folder: Path, root: Path, tiny_llama_dir: Path) -> None:
    ref = prepared.ensure(arguments(folder), tiny_llama_dir, root=root)
    prepared.verify(ref)
    [path] = Path(ref.path).glob("*.arrow")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match="other content than was committed"):
        prepared.verify(ref.path)


def test_what_is_no_prepared_data_is_not_opened(tmp_path: Path) -> None:
    with store.staging(tmp_path / "x") as directory:
        store.commit(directory, tmp_path / "x", {"kind": "something"})
    with pytest.raises(DataError, match="holds no prepared data"):
        prepared.open(str(tmp_path / "x"))


# --- several processes ------------------------------------------------------------------------

BUILDER = """
import logging, sys, time
from pathlib import Path
from llmray.arguments.loading import load
from llmray.data import build, planning, prepared
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
planning.LEAST_SHARD_BYTES = 700
one = build.build_shard
def slowly(plan, index):
    report = one(plan, index)
    print("built", index, flush=True)
    time.sleep(float(sys.argv[4]))
    return report
prepared.build_shard = slowly
ref = prepared.ensure(load(sys.argv[1]), sys.argv[2], root=Path(sys.argv[3]))
print("has", ref.key, flush=True)
"""


def start_builder(
    run_file: Path, model: Path, root: Path, pause_s: float, **environ: str
) -> subprocess.Popen[str]:
    words = [str(run_file), str(model), str(root), str(pause_s)]
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, *words],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environ},
    )


def test_a_killed_builder_leaves_nothing_and_the_next_goes_on(
    folder: Path, root: Path, tmp_path: Path, tiny_llama_dir: Path, small_shards: None
) -> None:
    given = arguments(folder)
    given.save(folder / "run.yaml")
    builder = start_builder(folder / "run.yaml", tiny_llama_dir, root, pause_s=0.5)
    assert builder.stdout is not None
    for line in builder.stdout:
        if line.startswith("built 2"):
            break
    builder.send_signal(signal.SIGKILL)
    assert builder.wait(300) == -signal.SIGKILL
    assert store.list_committed(root) == []
    [staging] = root.glob("*.building")
    (staging / f".tmp-left-{'0' * 8}-1-0-{'0' * 8}").write_text("by a dead writer")
    os.utime(next(staging.glob(".tmp-left*")), (1e9, 1e9))
    done = {path.name: path.stat().st_mtime_ns for path in staging.glob("*.arrow")}
    assert 3 <= len(done) < 10
    ref = prepared.ensure(given, tiny_llama_dir, root=root)
    again = {path.name: path.stat().st_mtime_ns for path in Path(ref.path).glob("*.arrow")}
    assert done.items() <= again.items()  # finished shards were not built again
    assert list(root.glob("*.building")) == []
    prepared.verify(ref)
    committed = {store.MANIFEST, *store.read_manifest(ref.path).files}
    assert {path.name for path in Path(ref.path).iterdir()} == committed
    whole = prepared.ensure(given, tiny_llama_dir, root=tmp_path / "undisturbed")
    assert files_of(ref.path) == files_of(whole.path)


def test_processes_of_one_run_build_once(folder: Path, root: Path, tiny_llama_dir: Path) -> None:
    """Also when each is told to build anew: without that, the second has even less to ask."""
    given = arguments(folder, overwrite_cache=True)
    given.save(folder / "run.yaml")
    environ = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29555"}
    builders = [
        start_builder(folder / "run.yaml", tiny_llama_dir, root, pause_s=0.05, **environ)
        for _ in range(2)
    ]
    said = [builder.communicate(timeout=800)[0].splitlines() for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0]
    built = [line for lines in said for line in lines if line.startswith("built")]
    assert len(built) == len(set(built)) > 5
    assert said[0][-1] == said[1][-1]


def test_processes_report_wrong_rows_and_a_process_that_dies(
    folder: Path,
    root: Path,
    tiny_llama_dir: Path,
    small_shards: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = arguments(folder, preprocessing_num_workers=2)
    killing = "import os; os.kill(os.getpid(), 9)"
    with monkeypatch.context() as patched:
        patched.setattr(workers, "COMMAND", killing)
        with pytest.raises(DataError, match="ended with code -9"):
            prepared.ensure(given, tiny_llama_dir, root=root)
    lines = (folder / "rows.jsonl").read_text().splitlines()
    lines[20] = "{"
    (folder / "rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"row 21 \(line 21\): malformed JSON"):
        prepared.ensure(given, tiny_llama_dir, root=root)
    assert store.list_committed(root) == []


def test_overwrite_cache_builds_anew_at_every_call(
    folder: Path, root: Path, tiny_llama_dir: Path
) -> None:
    times = []
    for keys in ({}, {"overwrite_cache": True}, {}, {"overwrite_cache": True}):
        ref = prepared.ensure(arguments(folder, **keys), tiny_llama_dir, root=root)
        times.append(store.read_manifest(ref.path).metadata["built_at"])
        time.sleep(0.01)
    assert times[0] < times[1] == times[2] < times[3]
    first, second = (
        prepared.ensure(
            arguments(folder, overwrite_cache=True), tiny_llama_dir, root=root, run_token="run 1"
        )
        for _ in range(2)
    )
    assert first == second
    assert (
        store.read_manifest(first.path).metadata["built_at"]
        == store.read_manifest(second.path).metadata["built_at"]
    )


def test_a_digest_of_a_file_that_changes_in_place_is_taken_again(tmp_path: Path) -> None:
    from llmray.data.identity import Digests

    digests = Digests(tmp_path / "digests")
    path = tmp_path / "a"
    path.write_text("one")
    os.utime(path, (1e9, 1e9))
    first = digests.of(path)
    path.write_text("two")  # as long as before
    os.utime(path, (1e9, 1e9 + 1))
    assert digests.of(path) != first
    # younger than the clock can tell apart: never remembered
    path.write_text("six")
    seen, second = path.stat(), digests.of(path)
    path.write_text("ten")
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert digests.of(path) != second


def test_a_token_that_the_tokenizer_lacks_and_unread_columns_are_said(
    folder: Path, root: Path, tiny_llama_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="llmray"):
        given = arguments(folder, template="llama3", cutoff_len=512)
        prepared.ensure(given, tiny_llama_dir, root=root)
        prepared.ensure(arguments(folder, stage="pt"), tiny_llama_dir, root=root)
    said = "\n".join(caplog.messages)
    assert "template=llama3 ends responses with <|eot_id|>, which is no token" in said
    assert "rows: stage pt learns the text of column instruction alone, not that of output" in said


def test_tokenized_path_is_the_place_and_is_only_taken_with_the_same_inputs(
    folder: Path, root: Path, tiny_llama_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = folder / "kept" / "tokens"
    keys = {"tokenized_path": str(place)}
    ref = prepared.ensure(arguments(folder, **keys), tiny_llama_dir, root=root)
    assert ref.path == str(place)
    assert files_of(ref.path) == files_of(
        prepared.ensure(arguments(folder), tiny_llama_dir, root=root).path
    )
    assert prepared.ensure(arguments(folder, **keys), tiny_llama_dir, root=root) == ref
    with pytest.raises(DataError, match="cutoff_len 64 there, 60 here"):
        prepared.ensure(arguments(folder, **keys, cutoff_len=60), tiny_llama_dir, root=root)
    with pytest.raises(DataError, match=r"sets .* there, .* here"):
        prepared.ensure(arguments(folder, **keys, dataset="other"), tiny_llama_dir, root=root)
    anew = {**keys, "cutoff_len": 60, "overwrite_cache": True}
    assert prepared.ensure(arguments(folder, **anew), tiny_llama_dir, root=root).key != ref.key
    (folder / "rows.jsonl").unlink()
    same = {**keys, "cutoff_len": 60}
    caplog.set_level("INFO", "llmray")
    found = prepared.ensure(arguments(folder, **same), tiny_llama_dir, root=root)
    assert found.path == str(place)
    assert "are not here, so only the settings and the tokenizer were compared" in caplog.text
    with pytest.raises(DataError, match="cutoff_len 60 there, 64 here"):
        prepared.ensure(arguments(folder, **keys), tiny_llama_dir, root=root)


def test_tokenized_path_that_holds_something_else_is_refused(
    folder: Path, root: Path, tiny_llama_dir: Path
) -> None:
    with pytest.raises(DataError, match="holds files, and no data that llmray prepared"):
        prepared.ensure(arguments(folder, tokenized_path=str(folder)), tiny_llama_dir, root=root)
    anew = arguments(folder, tokenized_path=str(folder), overwrite_cache=True)
    with pytest.raises(DataError, match="holds files, and no data that llmray prepared"):
        prepared.ensure(anew, tiny_llama_dir, root=root)
    assert (folder / "rows.jsonl").exists()
    with pytest.raises(DataError, match="is a URI, and prepared data is mapped into memory"):
        prepared.ensure(
            arguments(folder, tokenized_path="s3://bucket/tokens"), tiny_llama_dir, root=root
        )


def test_prepared_data_is_found_where_this_machine_has_it(
    folder: Path, root: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    ref = prepared.ensure(arguments(folder), tiny_llama_dir, root=root)
    own = tmp_path / "own"
    assert prepared.place_here(ref, own) == ref
    theirs = prepared.ensure(arguments(folder), tiny_llama_dir, root=own)
    assert prepared.place_here(ref, own) == theirs
    (folder / "rows.jsonl").unlink()
    assert not prepared.has_sources(arguments(folder), root=root)
    assert prepared.has_sources(arguments(folder, dataset="other"), root=root)


def test_packing_is_planned_once_and_committed_with_the_data(
    folder: Path, root: Path, tiny_llama_dir: Path, small_shards: None
) -> None:
    model = copied(tiny_llama_dir, folder / "model")
    keys = {"val_size": 5, "cutoff_len": 256}
    plain = arguments(folder, **keys)
    packs = arguments(folder, **keys, packing=True)
    unpacked = prepared.open(prepared.ensure(plain, model, root=root))
    ref = prepared.ensure(packs, model, root=root)
    prepared.verify(ref)
    assert set(prepared.packing.FILES) <= set(store.read_manifest(ref.path).files)
    table = prepared.open(ref)
    assert isinstance(table.train, prepared.PackedTable)
    assert table.train.num_rows == len(unpacked.train) == ref.num_train == 35
    assert len(table.train) < 20
    assert table.train.lengths.max() <= 256
    assert len(table.eval["eval"]) == 5, "rows to evaluate on are not packed"
    again = prepared.ensure(arguments(folder, **keys, neat_packing=True), model, root=root)
    assert again.path == ref.path != unpacked.path


def test_shards_left_at_tokenized_path_by_other_inputs_are_not_taken(
    folder: Path, root: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"tokenized_path": str(folder / "kept")}

    def dies(*given: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(prepared, "commit", dies)
        with pytest.raises(KeyboardInterrupt):
            prepared.ensure(arguments(folder, **place), tiny_llama_dir, root=root)
    [left] = folder.glob("kept.*.building")
    assert list(left.glob("*.arrow"))
    short = prepared.ensure(arguments(folder, **place, cutoff_len=60), tiny_llama_dir, root=root)
    assert prepared.open(short).train.lengths.max() <= 60
