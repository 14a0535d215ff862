"""Streams: each row once an epoch whoever reads, the same steps by any split, exact resume."""

from __future__ import annotations

import csv
import itertools
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet as pq

from llmray.arguments import capabilities
from llmray.arguments.loading import load
from llmray.arguments.run import RunArguments
from llmray.data import access, file_rows, mixing, prepared, streaming
from llmray.data.file_rows import Ranks
from llmray.data.quarantine import Quarantine
from llmray.data.shards import Sample
from llmray.errors import CheckpointError, DataError
from llmray.train import state_files

NUM_ROWS = 53


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files in two sets, 53 rows together; the same rows as a table; their texts."""
    draw = np.random.default_rng(0)
    rows = [
        {"instruction": f"Number {i}.", "output": "word " * int(draw.integers(1, 20))}
        for i in range(NUM_ROWS)
    ]
    (tmp_path / "many").mkdir()
    parts = {"many/a.jsonl": rows[:20], "many/b.jsonl": rows[20:22], "list.json": rows[22:]}
    for name, part in parts.items():
        is_list = name.endswith(".json")
        text = json.dumps(part) if is_list else "\n".join(map(json.dumps, part)) + "\n"
        (tmp_path / name).write_text(text)
    texts = [row["output"].strip() for row in rows]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table.parquet", row_group_size=7)
    with open(tmp_path / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["instruction", "output"])
        writer.writeheader()
        writer.writerows(rows)
    info = {
        "parquet": {"file_name": "table.parquet"},
        "csv": {"file_name": "table.csv"},
        "many": {"file_name": "many"},
        "list": {"file_name": "list.json"},
        "texts": {"file_name": "texts.txt", "columns": {"prompt": "text"}},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    return tmp_path


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_rows, "PIECE_BYTES", 400)  # of about four rows


def arguments(folder: Path, **keys: Any) -> RunArguments:
    given = {
        "model_name_or_path": "tiny",
        "stage": "sft",
        "do_train": True,
        "template": "chatml",
        "dataset": "many,list",
        "dataset_dir": str(folder),
        "output_dir": str(folder / "out"),
        "cutoff_len": 128,
        "streaming": True,
        "buffer_size": 16,
        "max_steps": 10,
        "per_device_train_batch_size": 6,
    }
    return load({**given, **keys}, environ={})


def together(world_size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What each rank comes to; ranks are threads that meet where they gather."""
    barrier = threading.Barrier(world_size, timeout=600)
    values: list[Any] = [None] * world_size

    def ranks(rank: int) -> Ranks:
        def gather(value: Any) -> list[Any]:
            values[rank] = value
            barrier.wait()
            found = list(values)
            barrier.wait()
            return found

        return Ranks(rank, world_size, gather)

    with ThreadPoolExecutor(world_size) as threads:
        return list(threads.map(work, map(ranks, range(world_size))))


def text(sample: Sample) -> tuple[int, ...]:
    return tuple(sample.input_ids.tolist())


def steps(given: RunArguments, model: Path, world_size: int, count: int) -> list[list[Any]]:
    """For each of the first steps, and each rank, its micro-batches as lists of tokens."""

    def work(ranks: Ranks) -> list[list[list[tuple[int, ...]]]]:
        stream = access.open_stream(given, model, root=model, ranks=ranks).train
        made = [stream.step() for _ in range(count)]
        return [[[text(row) for row in part] for part in step] for step in made]

    return [list(step) for step in zip(*together(world_size, work), strict=True)]


def rows_of(step: list[Any]) -> list[tuple[int, ...]]:
    return sorted(row for rank in step for part in rank for row in part)


@pytest.fixture(scope="module")
def all_rows(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Callable:
    def read(folder: Path, **keys: Any) -> list[tuple[int, ...]]:
        given = arguments(folder, streaming=False, **keys)
        table = prepared.open(
            prepared.ensure(given, tiny_llama_dir, root=tmp_path_factory.mktemp("prepared"))
        ).train
        return [text(table[i]) for i in range(len(table))]

    return read


# per_device, accumulation, world_size: all with 6 rows a step
SPLITS = [(6, 1, 1), (1, 6, 1), (3, 1, 2), (1, 3, 2), (2, 1, 3), (1, 2, 3)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("piece_bytes", [150, 400, 1 << 20])
def test_an_epoch_sees_each_row_once(
    world_size: int,
    piece_bytes: int,
    folder: Path,
    tiny_llama_dir: Path,
    all_rows: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two epochs of 9 steps of 6 rows, the last of 5; also with fewer files than ranks."""
    monkeypatch.setattr(file_rows, "PIECE_BYTES", piece_bytes)
    given = arguments(folder, per_device_train_batch_size=6 // world_size)
    made = steps(given, tiny_llama_dir, world_size, 18)
    expected = sorted(all_rows(folder))
    assert len(expected) == NUM_ROWS
    epochs = [
        sorted(row for step in part for row in rows_of(step)) for part in (made[:9], made[9:])
    ]
    assert epochs == [expected, expected]
    assert [len(rows_of(step)) for step in made[:9]] == [6] * 8 + [5]
    assert [rows_of(step) for step in made[:9]] != [rows_of(step) for step in made[9:]]


@pytest.mark.parametrize("split", SPLITS)
def test_steps_do_not_depend_on_how_they_are_split(
    split: tuple[int, int, int], folder: Path, tiny_llama_dir: Path
) -> None:
    per_device, accumulation, world_size = split
    keys = {"gradient_accumulation_steps": accumulation}
    given = arguments(folder, per_device_train_batch_size=per_device, **keys)
    made = steps(given, tiny_llama_dir, world_size, 12)
    alone = steps(arguments(folder), tiny_llama_dir, 1, 12)
    assert [rows_of(step) for step in made] == [rows_of(step) for step in alone]
    for step in made:
        [count] = {len(rank) for rank in step}
        assert 1 <= count <= accumulation
        assert max(len(part) for rank in step for part in rank) <= per_device


def test_without_shuffling_rows_come_in_the_order_of_the_files(
    folder: Path, tiny_llama_dir: Path, all_rows: Callable
) -> None:
    made = steps(arguments(folder, disable_shuffling=True), tiny_llama_dir, 1, 9)
    assert [row for [[part]] in made for row in part] == all_rows(folder)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_last_step_that_is_not_full_is_left_out(
    world_size: int, folder: Path, tiny_llama_dir: Path
) -> None:
    keys = {"dataloader_drop_last": True, "per_device_train_batch_size": 6 // world_size}
    made = steps(arguments(folder, **keys), tiny_llama_dir, world_size, 17)
    assert [len(rows_of(step)) for step in made] == [6] * 17  # 8 of them an epoch
    first = [row for step in made[:8] for row in rows_of(step)]
    assert len(set(first)) == len(first) == 48


def test_fewer_rows_than_a_step_are_said(folder: Path, tiny_llama_dir: Path) -> None:
    keys = {"dataloader_drop_last": True, "per_device_train_batch_size": 60}
    stream = access.open_stream(
        arguments(folder, **keys), tiny_llama_dir, root=folder / "x", ranks=Ranks()
    ).train
    with pytest.raises(DataError, match="dataloader_drop_last leaves these out"):
        stream.step()


def test_the_buffer_is_what_rows_are_drawn_from(
    folder: Path, tiny_llama_dir: Path, all_rows: Callable
) -> None:
    """Row i of the stream comes after at least i - 15 others: it enters a buffer of 16 then."""
    places = {row: i for i, row in enumerate(all_rows(folder))}
    order = [
        places[row] for [[part]] in steps(arguments(folder), tiny_llama_dir, 1, 9) for row in part
    ]
    assert all(place <= at + 15 for at, place in enumerate(order))
    assert max(place - at for at, place in enumerate(order)) > 8
    other = steps(arguments(folder, seed=7), tiny_llama_dir, 1, 9)
    assert [places[row] for [[part]] in other for row in part] != order
    larger = steps(arguments(folder, buffer_size=99), tiny_llama_dir, 1, 9)
    assert places[larger[0][0][0][0]] > 15 or places[larger[0][0][0][1]] > 15


def resumed(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The state as a checkpoint keeps it."""
    state_files.write_state(folder / "state", "batches", state)
    return state_files.read_state(folder / "state", "batches")


READ = [
    {},
    {"dataset": "parquet"},
    {"dataset": "csv"},
    {"stage": "pt", "dataset": "texts", "cutoff_len": 32},
]
IN_TURNS = [
    {"max_samples": 21},
    {"mix_strategy": "interleave_once"},
    {"mix_strategy": "interleave_over", "interleave_probs": "0.7,0.3"},
]


@pytest.mark.parametrize(
    ("at", "keys", "world_size"),
    [
        *itertools.product([0, 1, 4, 8, 9, 13], READ, [1, 2]),
        *itertools.product([4, 13], IN_TURNS, [2]),
    ],
)
def test_a_resumed_stream_goes_on_as_if_nothing_had_been(
    at: int,
    keys: dict,
    world_size: int,
    folder: Path,
    tiny_llama_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also by another number of ranks: the state is the same on all of them."""
    monkeypatch.setattr(mixing, "DRAWS", 8)
    whole = steps(arguments(folder, **keys), tiny_llama_dir, 1, 20)
    before = access.open_stream(
        arguments(folder, **keys), tiny_llama_dir, root=tmp_path, ranks=Ranks()
    ).train
    for _ in range(at):
        before.step()
    state = resumed(before.state_dict(), tmp_path)
    given = arguments(folder, per_device_train_batch_size=6 // world_size, **keys)

    def work(ranks: Ranks) -> list[Any]:
        stream = access.open_stream(given, tiny_llama_dir, root=tmp_path, ranks=ranks).train
        stream.load_state_dict(state)
        return [stream.step() for _ in range(20 - at)]

    parts = together(world_size, work)
    for number in range(at, 20):
        rows = [text(row) for rank in parts for part in rank[number - at] for row in part]
        assert sorted(rows) == rows_of(whole[number])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": 7}, r"seed \(or data_seed\) is 42, here it is 7"),
        ({"buffer_size": 8}, "buffer_size is 16, here it is 8"),
        ({"disable_shuffling": True}, "buffer_size is 16, here it is None"),
        ({"per_device_train_batch_size": 5}, "step has 6 rows, here it has 5"),
    ],
)
def test_a_position_in_another_order_is_refused(
    changed: dict, words: str, folder: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    state = access.open_stream(arguments(folder), tiny_llama_dir, root=tmp_path, ranks=Ranks())
    other = access.open_stream(
        arguments(folder, **changed), tiny_llama_dir, root=tmp_path, ranks=Ranks()
    )
    with pytest.raises(CheckpointError, match=words):
        other.train.load_state_dict(state.train.state_dict())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_blocks_of_texts_hold_every_token_once(
    world_size: int, folder: Path, tiny_llama_dir: Path, all_rows: Callable
) -> None:
    keys = {"stage": "pt", "dataset": "texts", "cutoff_len": 32, "disable_shuffling": True}
    expected = all_rows(folder, **keys)
    per_device = {"per_device_train_batch_size": 6 // world_size}
    count = -(-len(expected) // 6)
    made = steps(arguments(folder, **keys, **per_device), tiny_llama_dir, world_size, count)
    blocks = [row for step in made for row in rows_of(step)]
    assert sorted(blocks) == sorted(expected)
    assert {len(block) for block in expected[:-1]} == {32}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("buffer_size", [4, 1000])
def test_rows_set_aside_are_not_trained_on(
    world_size: int, buffer_size: int, folder: Path, tiny_llama_dir: Path, all_rows: Callable
) -> None:
    """7 of 53 rows; 46 are left, in 8 steps an epoch."""
    keys = {"val_size": 7, "buffer_size": buffer_size}
    given = arguments(folder, per_device_train_batch_size=6 // world_size, **keys)

    def work(ranks: Ranks) -> tuple[list[Any], list[Any]]:
        opened = access.open_stream(given, tiny_llama_dir, root=folder / "x", ranks=ranks)
        table = opened.eval["eval"]
        made = [opened.train.step() for _ in range(16)]
        return [text(table[i]) for i in range(len(table))], made

    found = together(world_size, work)
    held = found[0][0]
    assert all(one == held for one, _ in found)
    assert len(held) == 7
    for epoch in (slice(0, 8), slice(8, 16)):
        rows = [text(r) for _, made in found for step in made[epoch] for part in step for r in part]
        assert sorted(rows + held) == sorted(all_rows(folder))
    assert held != all_rows(folder)[:7]


def test_more_rows_set_aside_than_there_are(folder: Path, tiny_llama_dir: Path) -> None:
    with pytest.raises(DataError, match="val_size=53 sets 53 rows aside, and there are 53"):
        access.open_stream(
            arguments(folder, val_size=53), tiny_llama_dir, root=folder / "x", ranks=Ranks()
        )


def test_named_sets_are_evaluated_on(folder: Path, tiny_llama_dir: Path) -> None:
    given = arguments(folder, dataset="list", eval_dataset="many")
    opened = access.open_stream(given, tiny_llama_dir, root=folder / "x", ranks=Ranks())
    table = opened.eval["eval"]
    assert len(table) == table.num_rows == 22
    assert table.lengths.tolist() == [len(table[i].input_ids) for i in range(22)]
    assert table.target_counts.tolist() == [int(table[i].target_mask.sum()) for i in range(22)]


@pytest.mark.parametrize("world_size", [1, 3])
def test_wrong_rows_are_told_on_every_rank(
    world_size: int, folder: Path, tiny_llama_dir: Path
) -> None:
    with open(folder / "many" / "a.jsonl", "a") as file:
        file.write('{"instruction": "no output"}\n')

    def work(ranks: Ranks) -> str:
        given = arguments(folder, per_device_train_batch_size=6 // world_size)
        stream = access.open_stream(given, tiny_llama_dir, root=folder / "x", ranks=ranks).train
        with pytest.raises(DataError) as error:
            list(iter(stream.step, None))
        return str(error.value)

    said = together(world_size, work)
    assert len(set(said)) == 1
    assert "a.jsonl, row 21 (line 21)" in said[0]


@pytest.mark.parametrize("world_size", [1, 2])
def test_wrong_rows_are_left_out_where_that_is_asked_for(
    world_size: int, folder: Path, tiny_llama_dir: Path, all_rows: Callable
) -> None:
    expected = sorted(all_rows(folder))
    with open(folder / "many" / "a.jsonl", "a") as file:
        file.write('{"instruction": "no output"}\n')
    keys = {"bad_rows": "skip", "per_device_train_batch_size": 6 // world_size}
    made = steps(arguments(folder, **keys), tiny_llama_dir, world_size, 9)
    assert sorted(row for step in made for row in rows_of(step)) == expected


def test_a_file_that_is_no_json_is_told(folder: Path, tiny_llama_dir: Path) -> None:
    (folder / "list.json").write_text('[{"instruction": "a", "output": "b"}, {"instr')
    stream = access.open_stream(
        arguments(folder, dataset="list"), tiny_llama_dir, root=folder / "x", ranks=Ranks()
    ).train
    with pytest.raises(DataError, match=r"list\.json, row 2 .*malformed JSON"):
        stream.step()


def test_no_rows_at_all(folder: Path, tiny_llama_dir: Path) -> None:
    (folder / "list.json").write_text("[]")
    stream = access.open_stream(
        arguments(folder, dataset="list"), tiny_llama_dir, root=folder / "x", ranks=Ranks()
    ).train
    with pytest.raises(DataError, match="No row of the stream is left to train on"):
        stream.step()


def test_the_buffer_of_a_checkpoint_is_tensors(
    folder: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    stream = access.open_stream(
        arguments(folder), tiny_llama_dir, root=tmp_path, ranks=Ranks()
    ).train
    stream.step()
    state = stream.state_dict()
    assert isinstance(state["buffer"]["input_ids"]["values"], torch.Tensor)
    rows = streaming.unpack_samples(state["buffer"])
    assert len(rows) == 15
    assert all(len(row.input_ids) == len(row.target_mask) for row in rows)
    assert streaming.unpack_samples(streaming.pack_samples([])) == []


def test_a_key_follows_from_names_and_sizes(folder: Path, tiny_llama_dir: Path) -> None:
    def key(**keys: Any) -> str:
        return access.ready(arguments(folder, **keys), tiny_llama_dir, root=folder / "x").key

    same = key()
    assert key(max_steps=3, learning_rate=0.1) == same
    assert key(cutoff_len=64) != same
    assert key(dataset="list") != same
    os.truncate(folder / "many" / "b.jsonl", 10)
    assert key() != same


MIXED = [
    {"mix_strategy": "interleave_under"},
    {"mix_strategy": "interleave_over"},
    {"mix_strategy": "interleave_once"},
    {"mix_strategy": "interleave_under", "interleave_probs": "0.2,0.5,0.3"},
    {"mix_strategy": "interleave_over", "interleave_probs": "0.6,0,0.4"},
    {"mix_strategy": "interleave_once", "interleave_probs": "0.6,0.1,0.3"},
    {"mix_strategy": "interleave_once", "max_samples": 21},
    {"max_samples": 21},
]


@pytest.mark.parametrize("keys", MIXED)
@pytest.mark.parametrize("world_size", [1, 2])
def test_sets_are_mixed_as_those_of_prepared_data(
    world_size: int,
    keys: dict,
    folder: Path,
    tiny_llama_dir: Path,
    all_rows: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the order of the files, with a row that cannot be read; over two epochs."""
    monkeypatch.setattr(mixing, "DRAWS", 8)
    with open(folder / "many" / "b.jsonl", "a") as file:
        file.write('{"instruction": "no output"}\n')
    given = {"dataset": "many,list,parquet", "disable_shuffling": True, "bad_rows": "skip", **keys}
    expected = all_rows(folder, **given)
    count = -(-len(expected) // 6)
    each = arguments(folder, per_device_train_batch_size=6 // world_size, **given)
    made = [rows_of(step) for step in steps(each, tiny_llama_dir, world_size, 2 * count)]
    epoch = [sorted(expected[start : start + 6]) for start in range(0, len(expected), 6)]
    assert made == epoch * 2


def test_a_set_without_rows_cannot_be_interleaved(folder: Path, tiny_llama_dir: Path) -> None:
    (folder / "list.json").write_text("[]")
    given = arguments(folder, mix_strategy="interleave_over")
    stream = access.open_stream(given, tiny_llama_dir, root=folder / "x", ranks=Ranks()).train
    with pytest.raises(DataError, match=r"list has no rows\. Required: at least one to interleave"):
        stream.step()


def test_a_row_that_comes_again_is_not_both_trained_and_evaluated(
    folder: Path, tiny_llama_dir: Path
) -> None:
    """Of the 22 rows of one set, which come again until the 31 of the other one are used up."""
    given = arguments(folder, mix_strategy="interleave_over", val_size=9, buffer_size=1000)
    opened = access.open_stream(given, tiny_llama_dir, root=folder / "x", ranks=Ranks())
    table = opened.eval["eval"]
    held = {text(table[i]) for i in range(len(table))}
    assert len(held) == 9
    trained = [text(row) for _ in range(8) for part in opened.train.step() for row in part]
    assert len(trained) > len(set(trained))
    assert not held & set(trained)


@pytest.mark.parametrize("keys", [{"eval_dataset": "many"}, {"val_size": 5}])
def test_rows_are_prompts_where_responses_to_them_are_judged(
    keys: dict, folder: Path, tiny_llama_dir: Path
) -> None:
    """The response follows the prompt, and nothing else is learned."""
    plain, judged = (
        access.open_stream(
            arguments(folder, dataset="list", predict_with_generate=judges, **keys),
            tiny_llama_dir,
            root=folder / "x",
            ranks=Ranks(),
        ).eval["eval"]
        for judges in (False, True)
    )
    assert len(judged) == len(plain) > 0
    for number in range(len(plain)):
        row, whole = judged[number], plain[number]
        assert row.target_mask.tolist() == sorted(row.target_mask.tolist())
        assert text(row)[: len(text(whole)) - 2] == text(whole)[:-2]


@pytest.mark.parametrize("world_size", [1, 2])
def test_rows_that_cannot_be_read_are_put_aside_once(
    world_size: int, folder: Path, tiny_llama_dir: Path
) -> None:
    """Over two epochs, by rank 0 alone; the same as those of prepared data."""
    with open(folder / "many" / "a.jsonl", "a") as file:
        file.write('{"instruction": "no output"}\n{\n')
    keys = {"bad_rows": "quarantine", "per_device_train_batch_size": 6 // world_size}
    given = arguments(folder, **keys)

    def work(ranks: Ranks) -> None:
        stream = access.open_stream(given, tiny_llama_dir, root=folder / "x", ranks=ranks).train
        stream.step()
        assert stream.quarantine is not None
        path = folder / "bad.jsonl"
        stream.quarantine.open(path if ranks.rank == 0 else None, keeps=False)
        for _ in range(17):
            stream.step()

    together(world_size, work)
    whole = arguments(folder, streaming=False, **keys)
    ref = prepared.ensure(whole, tiny_llama_dir, root=folder / "prepared")
    assert (folder / "bad.jsonl").read_text() == prepared.bad_rows(ref)
    assert prepared.bad_rows(ref).count("\n") == 2


def test_rows_put_aside_before_a_kill_are_kept(tmp_path: Path) -> None:
    rows = [{"file": "a.json", "row": i, "reason": "wrong", "content": i} for i in range(5)]
    path = tmp_path / "bad.jsonl"
    first = Quarantine()
    first.add(rows[:1])
    first.open(path, keeps=True)
    first.add(rows[:3])
    whole = path.read_text()
    path.write_text(whole + '{"file": "a.json", "ro')  # its writer was killed
    second = Quarantine()
    second.open(path, keeps=True)
    second.add(rows)
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4]
    assert path.read_text().startswith(whole)
    anew = Quarantine()
    anew.open(path, keeps=False)
    assert path.read_text() == ""


def test_a_row_that_becomes_several_stays_together(
    folder: Path,
    tiny_llama_dir: Path,
    all_rows: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ranked answers make pairs; interleaved, and resumed between the pairs of one row."""
    monkeypatch.delitem(capabilities.NOT_BUILT, "stage", raising=False)
    for name, count in (("one", 9), ("two", 4)):
        rows = [
            {"instruction": f"{name} {i}", "chosen": "good " * i, "rejected": ["bad", "x " * i]}
            for i in range(1, count)
        ]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    info = {
        name: {"file_name": f"{name}.json", "ranking": True, "columns": columns}
        for name in ("one", "two")
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    keys = {"dataset": "one,two", "stage": "dpo", "mix_strategy": "interleave_over"}
    keys |= {"disable_shuffling": True, "per_device_train_batch_size": 1}
    expected = all_rows(folder, **keys)

    def stream() -> streaming.Stream:
        return access.open_stream(
            arguments(folder, **keys), tiny_llama_dir, root=tmp_path, ranks=Ranks()
        ).train

    first, made = stream(), []
    for _ in expected:
        state = first.state_dict()
        second = stream()
        second.load_state_dict(state)
        [[row]] = first.step()
        [[again]] = second.step()
        made.append(text(row))
        assert text(again) == made[-1]
    assert made == expected
    assert len(made) > 16


def test_judged_rows_of_a_stream_are_those_of_the_table(
    folder: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """Each with the answer of the row before; the first comes last. At any step it goes on."""
    rows = [
        {"instruction": f"Say {i}.", "output": "word " * (i % 4 + 1), "kto_tag": i % 3 > 0}
        for i in range(9)
    ]
    (folder / "judged.json").write_text(json.dumps(rows))
    info = {"judged": {"file_name": "judged.json", "columns": {"kto_tag": "kto_tag"}}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    keys: dict[str, Any] = {"dataset": "judged", "stage": "kto", "disable_shuffling": True}
    keys["per_device_train_batch_size"] = 1
    plain = arguments(folder, **keys, streaming=False)
    table = prepared.open(prepared.ensure(plain, tiny_llama_dir, root=tmp_path)).train

    def told(row: Any) -> tuple[Any, ...]:
        other = row.mismatched
        masks = row.target_mask.tolist(), other.target_mask.tolist()
        return (row.input_ids.tolist(), row.is_wanted, other.input_ids.tolist(), *masks)

    expected = [told(table[index % 9]) for index in range(1, 10)]

    def stream(**more: Any) -> streaming.Stream:
        given = arguments(folder, **keys | more)
        return access.open_stream(given, tiny_llama_dir, root=tmp_path, ranks=Ranks()).train

    first = stream()
    for row in expected * 2:
        second = stream()
        second.load_state_dict(first.state_dict())
        [[made]] = first.step()
        [[again]] = second.step()
        assert told(made) == told(again) == row
    shuffled = stream(disable_shuffling=False, buffer_size=4)
    made = [told(row) for _ in expected for [row] in shuffled.step()]
    assert sorted(made) == sorted(expected)
    assert made != expected


def test_a_judged_row_alone_is_refused(folder: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    (folder / "judged.json").write_text('[{"instruction": "a", "output": "b", "tag": true}]')
    info = {"judged": {"file_name": "judged.json", "columns": {"kto_tag": "tag"}}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    given = arguments(folder, dataset="judged", stage="kto")
    stream = access.open_stream(given, tiny_llama_dir, root=tmp_path, ranks=Ranks()).train
    with pytest.raises(DataError, match="kto has a stream of one row"):
        stream.step()
