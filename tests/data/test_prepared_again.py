"""Prepared data that is found again: looked at once on a machine, counted, compared, waited for."""

from __future__ import annotations

import json
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llmray import store
from llmray.arguments.loading import load
from llmray.arguments.run import RunArguments
from llmray.data import intact, locks, planning, prepared, workers
from llmray.data.differences import differences
from llmray.errors import DataError, StoreError

NUM_ROWS = 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"instruction": f"Say {i}.", "output": "the lazy dog " * 3} for i in range(NUM_ROWS)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "more.json").write_text(json.dumps(rows[:4]))
    info = {"rows": {"file_name": "rows.json"}, "more": {"file_name": "more.json"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    return tmp_path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "prepared"


def arguments(folder: Path, **keys: Any) -> RunArguments:
    given = {
        "model_name_or_path": "tiny",
        "stage": "sft",
        "do_train": True,
        "template": "chatml",
        "dataset": "rows",
        "dataset_dir": str(folder),
        "output_dir": str(folder / "out"),
        "cutoff_len": 64,
    }
    return load({**given, **keys}, environ={})


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The places whose bytes were read to compare them, in order."""
    places: list[str] = []
    verify = store.verify

    def counted(path: str) -> Any:
        places.append(str(path))
        return verify(path)

    monkeypatch.setattr(store, "verify", counted)
    return places


def test_each_machine_reads_the_bytes_once(
    folder: Path,
    root: Path,
    tiny_llama_dir: Path,
    verified: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not the one that wrote them; again only where a file is not as it was."""
    ref = prepared.ensure(arguments(folder), tiny_llama_dir, root=root)
    prepared.ensure(arguments(folder), tiny_llama_dir, root=root)
    assert verified == []
    monkeypatch.setattr(intact, "machine", lambda: "another")
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda _: intact.check(ref.path, root), range(3)))
    for _ in range(2):
        prepared.ensure(arguments(folder), tiny_llama_dir, root=root)
        prepared.open(ref)
    assert verified == [ref.path]
    [shard] = Path(ref.path).glob("train-*.arrow")
    os.utime(shard, (1e9, 1e9))
    prepared.ensure(arguments(folder), tiny_llama_dir, root=root)
    assert verified == [ref.path] * 2


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_told_before_anything_is_trained_on(
    damage: str, folder: Path, root: Path, tiny_llama_dir: Path
) -> None:
    ref = prepared.ensure(arguments(folder), tiny_llama_dir, root=root)
    [shard] = Path(ref.path).glob("train-*.arrow")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    if damage == "remove":
        shard.unlink()
    else:
        shard.write_bytes(content if damage == "flip" else content[:-1])
        os.utime(shard, (1e9, 1e9))
    with pytest.raises(StoreError, match=r"is damaged.*overwrite_cache: true it is prepared anew"):
        prepared.ensure(arguments(folder), tiny_llama_dir, root=root)
    again = prepared.ensure(arguments(folder, overwrite_cache=True), tiny_llama_dir, root=root)
    assert again.num_built == NUM_ROWS


def test_where_no_notes_can_be_kept_the_bytes_are_read_each_time(
    folder: Path, root: Path, tiny_llama_dir: Path, verified: list[str]
) -> None:
    ref = prepared.ensure(arguments(folder), tiny_llama_dir, root=root)
    (folder / "file").write_text("no folder")
    for _ in range(2):
        intact.check(ref.path, folder / "file" / "x")
    assert verified == [ref.path] * 2


def test_rows_are_counted_where_they_are_tokenized(
    folder: Path, root: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build that goes on counts the rows of what was missing."""
    monkeypatch.setattr(planning, "LEAST_SHARD_BYTES", 500)
    made = prepared.plan(arguments(folder), tiny_llama_dir, root=root)
    Path(made.staging).mkdir(parents=True)
    done = [prepared.build_shard(made, index) for index in (0, 2)]
    assert [report.is_new for report in done] == [True, True]
    assert not prepared.build_shard(made, 0).is_new
    ref = prepared.ensure(arguments(folder), tiny_llama_dir, root=root)
    assert ref.num_built == NUM_ROWS - sum(report.counts["read"] for report in done) > 0
    assert prepared.ensure(arguments(folder), tiny_llama_dir, root=root).num_built == 0
    anew = arguments(folder, overwrite_cache=True)
    assert prepared.ensure(anew, tiny_llama_dir, root=root).num_built == NUM_ROWS


def test_a_run_that_waited_for_another_s_data_compares_it(
    folder: Path,
    root: Path,
    tiny_llama_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Both want tokenized_path; the second one waits, and finds what the first has prepared."""
    place = {"tokenized_path": str(folder / "kept")}
    waits, build = threading.Event(), prepared.build_shard

    def slowly(*given: Any) -> Any:
        assert waits.wait(300), "the second run did not come"
        return build(*given)

    monkeypatch.setattr(prepared, "build_shard", slowly)

    class Says(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "another process is preparing it" in record.getMessage():
                waits.set()

    handler = Says()
    caplog.set_level("INFO", "llmray")
    locks.log.addHandler(handler)
    try:
        with ThreadPoolExecutor(2) as threads:
            given = arguments(folder, **place)
            first = threads.submit(prepared.ensure, given, tiny_llama_dir, root=root)
            while not (folder / "kept.lock").exists():
                assert not first.done(), first.result()
            other = arguments(folder, **place, cutoff_len=60)
            second = threads.submit(prepared.ensure, other, tiny_llama_dir, root=root)
            with pytest.raises(DataError, match="cutoff_len 64 there, 60 here"):
                second.result(300)
            assert first.result(300).num_built == NUM_ROWS
    finally:
        locks.log.removeHandler(handler)


def test_processes_that_find_no_work_end(tmp_path: Path) -> None:
    with workers.Processes(3, early=2) as processes:
        early = list(processes._started)
        assert [worker.poll() for worker in early] == [None, None]
    assert all(worker.poll() is not None for worker in early)


def test_what_nodes_differ_in_is_said_with_its_file() -> None:
    one = {"sets": [{"formatting": "alpaca", "files": [["json", "aa"], ["json", "bb"]]}]}
    other = {"sets": [{"formatting": "alpaca", "files": [["json", "aa"], ["json", "cc"]]}]}
    files = {"sets": [["/data/a.json", "/data/b.json"]]}
    said = differences(one, other, "on n1", "on n2", files)
    assert said == ["/data/b.json on n1 is not that on n2"]
    fewer = {"sets": [{"formatting": "alpaca", "files": [["json", "aa"]]}]}
    [line] = differences(one, fewer, "on n1", "on n2", {"sets": [["/data/a.json"]]})
    assert line == "the set of /data/a.json has 2 files on n1, 1 on n2"
    shared = {"sets": [{"formatting": "sharegpt", "files": [["json", "aa"], ["json", "bb"]]}]}
    [line] = differences(one, shared, "on n1", "on n2", files)
    assert line.startswith("sets [{")
    assert line.endswith("on n2")
    assert differences({**one, "cutoff_len": 1}, {**one, "cutoff_len": 2}) == [
        "cutoff_len 1 there, 2 here"
    ]
