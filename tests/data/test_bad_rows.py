"""Rows that cannot be learned from: each is refused with its place, left out, or put aside."""

import errno
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llmray import store
from llmray.arguments.loading import load, replace
from llmray.arguments.run import RunArguments
from llmray.data import planning, prepared, shards
from llmray.errors import DataError, StoreError

GOOD = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
TURNS = GOOD["conversations"]
BOM = b"\xef\xbb\xbf"

# what is written instead of a good row, and what is said of it
BAD: dict[str, tuple[Any, str]] = {
    "malformed JSON": (b'{"conversations": [', "malformed JSON at column"),
    "no object": (b"3", "the row is int 3. Required: an object of columns"),
    "a wrong type": ({"conversations": "a"}, "'conversations' is str 'a'. Required: a list"),
    "a wrong type inside": (
        {"conversations": [TURNS[0], {"from": "gpt", "value": 7}]},
        "'value' of message 2 is int 7",
    ),
    "no UTF-8": (b'{"conversations": "\xff"}', "byte 0xff is not UTF-8"),
    "half a character": (
        json.dumps({"conversations": [{"from": "human", "value": "\ud83d"}, TURNS[1]]}).encode(),
        r"'\ud83d' is half a character. Required: text in Unicode",
    ),
    "an empty conversation": ({"conversations": []}, "the conversation is empty"),
    "roles out of turn": ({"conversations": TURNS[::-1]}, "message 1 is from gpt, out of turn"),
    "no response": ({"conversations": TURNS[:1]}, "the last message, 1, has no response"),
    "an unknown role": (
        {"conversations": [{"from": "humen", "value": "a"}, TURNS[1]]},
        "message 1 is from 'humen', an unknown role. Did you mean 'human'?",
    ),
    "a missing column": ({"conversation": TURNS}, "column 'conversations' is missing"),
    "a row over the limit": (
        {"conversations": [TURNS[0], {"from": "gpt", "value": "word " * 99}]},
        "Required: at most cutoff_len=64",
    ),
}


def write(folder: Path, bad: Sequence[Any], name: str = "rows.jsonl", first: bytes = b"") -> None:
    lines = [GOOD, *bad, *[GOOD] * 5]
    raw = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in lines]
    (folder / name).write_bytes(first + b"\n".join(raw))
    info = {"rows": {"file_name": name, "formatting": "sharegpt"}}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def arguments(folder: Path, **keys: Any) -> RunArguments:
    given = {
        "model_name_or_path": "tiny",
        "do_train": True,
        "dataset": "rows",
        "dataset_dir": str(folder),
        "output_dir": str(folder / "out"),
        "cutoff_len": 64,
        "truncation": "error",
    }
    return load({**given, **keys})


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_refused_with_its_place(
    kind: str, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    row, said = BAD[kind]
    write(tmp_path, [row])
    with pytest.raises(DataError) as error:
        prepared.ensure(arguments(tmp_path), tiny_llama_dir, root=tmp_path / "prepared")
    for words in (said, f"{tmp_path}/rows.jsonl, row 2 (line 2): ", "bad_rows: skip"):
        assert words in str(error.value)


@pytest.mark.parametrize("policy", ["skip", "quarantine"])
def test_bad_rows_are_left_out_counted_and_put_aside(
    policy: str, tmp_path: Path, tiny_llama_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, [row for row, _ in BAD.values()])
    with caplog.at_level("INFO", logger="llmray"):
        given = arguments(tmp_path, bad_rows=policy)
        ref = prepared.ensure(given, tiny_llama_dir, root=tmp_path / "prepared")
    assert ref.num_train == 6
    report, warning = caplog.messages
    assert f"{len(BAD)} bad rows left out" in report
    assert warning.startswith(f"data: {len(BAD)} rows cannot be read and were left out; the first")
    assert "rows.jsonl, row 2 (line 2): malformed JSON at column" in warning
    lines = prepared.bad_rows(ref).splitlines()
    if policy == "skip":
        assert lines == []
        return
    found = [json.loads(line) for line in lines]
    assert [entry["row"] for entry in found] == list(range(2, 2 + len(BAD)))
    for entry, (row, said) in zip(found, BAD.values(), strict=True):
        assert entry["file"] == f"{tmp_path}/rows.jsonl"
        assert entry["line"] == entry["row"]
        assert said in entry["reason"]
        if not isinstance(row, bytes):
            assert entry["content"] == row
    assert found[0]["content"] == '{"conversations": ['
    assert found[4]["content"] == r'{"conversations": "\xff"}'


def test_the_same_bad_rows_whatever_the_shards_and_processes(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, [row for row, _ in BAD.values()])
    given = arguments(tmp_path, bad_rows="quarantine")
    one = prepared.ensure(given, tiny_llama_dir, root=tmp_path / "one")
    monkeypatch.setattr(planning, "LEAST_SHARD_BYTES", 200)
    two = replace(given, preprocessing_num_workers=2)
    several = prepared.ensure(two, tiny_llama_dir, root=tmp_path / "two")
    assert len(list(Path(several.path).glob("shard-*.json"))) > 3
    assert prepared.bad_rows(one) == prepared.bad_rows(several) != ""
    assert one.num_tokens == several.num_tokens


def test_the_first_ten_of_a_file_are_in_one_report(tmp_path: Path, tiny_llama_dir: Path) -> None:
    write(tmp_path, [b"{"] * 12)
    with pytest.raises(DataError) as error:
        prepared.ensure(arguments(tmp_path), tiny_llama_dir, root=tmp_path / "prepared")
    lines = str(error.value).splitlines()
    assert lines[0] == "Rows of the data are wrong (the first 10 shown):"
    assert [f"row {row} (line {row})" in lines[row - 1] for row in range(2, 12)] == [True] * 10
    assert "Mend them, or take them out. With bad_rows: skip, or quarantine," in lines[-1]


def test_a_byte_order_mark_is_no_part_of_the_first_row(
    tmp_path: Path, tiny_llama_dir: Path
) -> None:
    for name in ("rows.jsonl", "rows.json"):
        write(tmp_path, [], name, first=BOM)
        ref = prepared.ensure(arguments(tmp_path), tiny_llama_dir, root=tmp_path / "prepared")
        assert ref.num_train == 6


def test_a_list_that_breaks_off_is_refused_whatever_becomes_of_bad_rows(
    tmp_path: Path, tiny_llama_dir: Path
) -> None:
    write(tmp_path, [])
    (tmp_path / "rows.jsonl").rename(tmp_path / "rows.json")
    (tmp_path / "rows.json").write_text(f"[{json.dumps(GOOD)},\n{{]")
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"rows": {"file_name": "rows.json", "formatting": "sharegpt"}})
    )
    given = arguments(tmp_path, bad_rows="skip")
    with pytest.raises(DataError, match=r"rows.json, row 2 \(line 2\): malformed JSON"):
        prepared.ensure(given, tiny_llama_dir, root=tmp_path / "prepared")


def test_rows_over_the_limit_are_dropped_and_said(
    tmp_path: Path, tiny_llama_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, [BAD["a row over the limit"][0]])
    with caplog.at_level("INFO", logger="llmray"):
        given = arguments(tmp_path, truncation="drop")
        ref = prepared.ensure(given, tiny_llama_dir, root=tmp_path / "prepared")
    assert ref.num_train == 6
    assert "1 rows over cutoff_len left out" in caplog.messages[0]
    assert "the first is" in caplog.messages[1]
    assert "rows.jsonl, row 2 (line 2) has 436 tokens" in caplog.messages[1]


def test_nothing_but_bad_rows_is_an_error(tmp_path: Path, tiny_llama_dir: Path) -> None:
    write(tmp_path, [])
    (tmp_path / "rows.jsonl").write_text("{\n" * 4)
    given = arguments(tmp_path, bad_rows="skip")
    with pytest.raises(
        DataError, match=r"No row is left to train on: of 4 rows.* 4 cannot be read"
    ):
        prepared.ensure(given, tiny_llama_dir, root=tmp_path / "prepared")


def test_a_disk_that_fills_up_leaves_nothing_committed(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the third shard is written; with room again, only what is missing is built."""
    write(tmp_path, [GOOD] * 30)
    monkeypatch.setattr(planning, "LEAST_SHARD_BYTES", 700)
    root, written = tmp_path / "prepared", []
    put = shards.write

    def fills_up(path: Path, *given: Any) -> None:
        written.append(path.name)
        if len(written) == 3:
            with store.replacing(path) as unfinished, unfinished.open("wb") as file:
                file.write(b"half of it")
                raise OSError(errno.ENOSPC, "No space left on device")
        put(path, *given)

    monkeypatch.setattr(shards, "write", fills_up)
    with pytest.raises(StoreError, match=r"could not be written.*The disk is full: free space"):
        prepared.ensure(arguments(tmp_path), tiny_llama_dir, root=root)
    assert store.list_committed(root) == []
    [staging] = root.glob("*.building")
    assert sorted(path.name for path in staging.glob("*.arrow")) == written[:2]
    ref = prepared.ensure(arguments(tmp_path), tiny_llama_dir, root=root)
    assert ref.num_train == 36
    assert 0 < ref.num_built < 36
    assert written.count(written[0]) == 1


def test_media_of_a_row_are_not_left_out_silently(tmp_path: Path, tiny_llama_dir: Path) -> None:
    """Neither where their file is there nor where it is not."""
    write(tmp_path, [])
    (tmp_path / "rows.jsonl").write_text(json.dumps({**GOOD, "images": ["missing.png"]}))
    info = {"file_name": "rows.jsonl", "formatting": "sharegpt", "columns": {"images": "images"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": info}))
    with pytest.raises(DataError, match=r"row 1 \(line 1\): 'images' names images: training on"):
        prepared.ensure(arguments(tmp_path), tiny_llama_dir, root=tmp_path / "prepared")
