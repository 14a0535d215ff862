import bz2
import gzip
import json
import lzma
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmray.data import fetch, identity, sources
from llmray.data.row_format import Kind, RowFormat
from llmray.errors import DataError

ROW = {"instruction": "a", "output": "b"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.json").write_text(json.dumps([ROW]))
    return tmp_path


def describe(folder: Path, entry: Any, kind: Kind = "responses") -> sources.DataSet:
    (folder / "dataset_info.json").write_text(json.dumps({"mine": entry, "other": {}}))
    [found] = sources.open_sets(["mine"], str(folder), cache=folder / "hub", kind=kind)
    return found


def rows_of(dataset: sources.DataSet) -> list[Any]:
    [here] = sources.fetched([dataset])
    pieces = [piece for file in here.files for piece in sources.files.cut(file, 1 << 20)]
    return [row for piece in pieces for row in sources.files.read(piece)]


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
        ({}, ["names no data. Required: one of file_name, hf_hub_url, ms_hub_url, om_hub_url"]),
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
        ({"file_name": "rows.json", "num_samples": 0}, ["num_samples=0", "rows from 1"]),
        ({"file_name": "rows.json", "num_samples": "3"}, ["num_samples='3'", "rows from 1"]),
        ({"script_url": "x"}, ["loading script"]),
        ({"ms_hub_url": "x/y"}, ["on the ModelScope hub", "pip install modelscope"]),
        ({"om_hub_url": "x/y"}, ["on the Modelers hub", "pip install openmind"]),
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
        sources.open_sets(["mane"], str(folder), cache=folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "does not exist"), ("{", "is not JSON"), ("[]", "holds no object")],
)
def test_a_wrong_dataset_info_is_named(folder: Path, content: str | None, words: str) -> None:
    if content is not None:
        (folder / "dataset_info.json").write_text(content)
    with pytest.raises(DataError, match=f"dataset_info.json {words}"):
        sources.open_sets(["mine"], str(folder), cache=folder)


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


@pytest.mark.parametrize(
    ("entry", "variable", "hub"),
    [
        ({"hf_hub_url": "hf/a", "ms_hub_url": "ms/a"}, None, "hf/a"),
        ({"hf_hub_url": "hf/a", "ms_hub_url": "ms/a"}, "USE_MODELSCOPE_HUB", "ms/a"),
        ({"hf_hub_url": "hf/a", "om_hub_url": "om/a"}, "USE_OPENMIND_HUB", "om/a"),
        ({"hf_hub_url": "hf/a", "om_hub_url": "om/a"}, "USE_MODELSCOPE_HUB", "hf/a"),
        ({"om_hub_url": "om/a", "file_name": "rows.json"}, None, "om/a"),
        ({"ms_hub_url": "ms/a", "om_hub_url": "om/a"}, None, "ms/a"),
    ],
)
def test_the_hub_of_a_set(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    entry: dict[str, str],
    variable: str | None,
    hub: str,
) -> None:
    asked: list[tuple[str, Any]] = []

    def load(prefix: str) -> Any:
        def loaded(name: str, entry: Any) -> Any:
            asked.append((name, entry["subset"]))
            return FakeRows([ROW])

        return loaded

    for key, found in fetch.HUBS.items():
        monkeypatch.setitem(fetch.HUBS, key, replace(found, load=load(key)))
    if variable is not None:
        monkeypatch.setenv(variable, "1")
    rows = rows_of(describe(folder, {**entry, "subset": "part"}))
    assert asked == [(hub, "part")]
    assert rows == [ROW]


class FakeRows(list[Any]):
    _fingerprint = "abc"

    def to_parquet(self, path: str) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(list(self)), path)


def test_packages_of_other_hubs_are_asked_for_the_same_part(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    class MsDataset:
        @staticmethod
        def load(**options: Any) -> Any:
            asked.append(options)
            return MsDataset()

        def to_hf_dataset(self) -> FakeRows:
            return FakeRows([ROW])

    class OmDataset:
        @staticmethod
        def load_dataset(**options: Any) -> FakeRows:
            asked.append(options)
            return FakeRows([ROW])

    monkeypatch.setitem(sys.modules, "modelscope", SimpleNamespace(MsDataset=MsDataset))
    monkeypatch.setitem(sys.modules, "openmind", SimpleNamespace(OmDataset=OmDataset))
    part = {"subset": "s", "folder": "f", "split": "test"}
    for key in ("ms_hub_url", "om_hub_url"):
        assert rows_of(describe(folder, {key: "x/y", **part})) == [ROW]
    common = {"data_dir": "f", "split": "test", "token": None}
    assert asked == [
        {"dataset_name": "x/y", "subset_name": "s", **common},
        {"path": "x/y", "name": "s", **common},
    ]


# --- what a stage learns from -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "kind", "words"),
    [
        ({"ranking": True}, "responses", "it holds pairs of responses, from which this stage"),
        ({"ranking": True}, "text", "it holds pairs of responses"),
        ({"ranking": True}, "judged", "it holds pairs of responses"),
        ({}, "pair", "ranking: false: it holds no pairs of responses, which it needs"),
        ({"columns": {"kto_tag": "k"}}, "responses", "names a kto_tag"),
    ],
)
def test_a_set_that_a_stage_does_not_learn_from(
    folder: Path, entry: Any, kind: Any, words: str
) -> None:
    with pytest.raises(DataError) as error:
        describe(folder, {"file_name": "rows.json", **entry}, kind)
    assert words in str(error.value)


def test_sets_of_pairs_and_of_judged_responses_open_for_their_stages(folder: Path) -> None:
    pairs = {"file_name": "rows.json", "ranking": True, "columns": {"chosen": "c"}}
    assert describe(folder, pairs, "pair").layout.column("chosen") == "c"
    judged = {"file_name": "rows.json", "columns": {"kto_tag": "k"}}
    assert describe(folder, judged, "judged").layout.column("kto_tag") == "k"


# --- where sets may stand ---------------------------------------------------------------------


def test_entries_may_stand_in_the_run_file(folder: Path) -> None:
    entries = {"mine": {"file_name": str(folder / "rows.json"), "num_samples": 3}}
    [found] = sources.open_sets(["mine"], entries, cache=folder)
    assert found.num_samples == 3
    assert rows_of(found) == [ROW]
    with pytest.raises(DataError, match=r"other is no set of dataset_dir\. Required: one of mine"):
        sources.open_sets(["other"], entries, cache=folder)


def test_online_every_name_is_a_set_of_the_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(name: str, entry: Any) -> FakeRows:
        asked.append(name)
        return FakeRows([ROW])

    for key, hub in fetch.HUBS.items():
        monkeypatch.setitem(fetch.HUBS, key, replace(hub, load=load))
    found = sources.open_sets(["a/b", "c/d"], "ONLINE", cache=folder)
    assert [dataset.name for dataset in found] == asked == ["a/b", "c/d"]
    assert found[0].layout == RowFormat("alpaca")


def test_a_repository_of_the_hub_may_hold_entries_and_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "rows.json"}}))
    asked = []

    def snapshot(repository: str, *, repo_type: str, allow_patterns: list[str]) -> str:
        asked.append((repository, repo_type, allow_patterns[0]))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    [found] = sources.open_sets(["mine"], "REMOTE:some/data", cache=folder / "cache")
    assert rows_of(found) == [ROW]
    assert asked == [
        ("some/data", "dataset", "dataset_info.json"),
        ("some/data", "dataset", "rows.json"),
    ]

    def unreachable(*args: Any, **options: Any) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(DataError) as error:
        sources.open_sets(["mine"], "REMOTE:some/data", cache=folder)
    for word in ("dataset_info.json", "some/data", "no network", "name them by file_name"):
        assert word in str(error.value)


# --- compressed files and cloud storage -------------------------------------------------------


def zst(raw: bytes) -> bytes:
    import pyarrow as pa

    return pa.compress(raw, "zstd", asbytes=True)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zst,
}
CONTENTS = {
    "json": json.dumps([ROW, ROW]).encode(),
    "jsonl": json.dumps(ROW).encode() + b"\n" + json.dumps(ROW).encode(),
    "csv": b"instruction,output\na,b\na,b\n",
    "txt": b"a\nb\n",
}


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("kind", CONTENTS)
def test_compressed_files_hold_the_same_rows(folder: Path, kind: str, packed: str) -> None:
    (folder / f"plain.{kind}").write_bytes(CONTENTS[kind])
    (folder / f"packed.{kind}.{packed}").write_bytes(PACKERS[packed](CONTENTS[kind]))
    plain = rows_of(describe(folder, {"file_name": f"plain.{kind}"}))
    found = describe(folder, {"file_name": f"packed.{kind}.{packed}"})
    assert not Path(found.files[0].path).exists()  # nothing is unpacked before it is read
    assert rows_of(found) == plain
    assert len(plain) == 2
    assert found.files[0].name == str(folder / f"packed.{kind}.{packed}")


def test_several_members_of_one_compressed_file_follow_one_another(folder: Path) -> None:
    for packed, pack in PACKERS.items():
        path = folder / f"rows.jsonl.{packed}"
        path.write_bytes(pack(CONTENTS["jsonl"] + b"\n") + pack(CONTENTS["jsonl"]))
        assert rows_of(describe(folder, {"file_name": path.name})) == [ROW] * 4, packed


@pytest.mark.parametrize("packed", PACKERS)
def test_a_compressed_file_that_breaks_off_is_named(folder: Path, packed: str) -> None:
    raw = PACKERS[packed](os.urandom(1 << 16))
    (folder / f"rows.txt.{packed}").write_bytes(raw[: len(raw) // 2])
    found = describe(folder, {"file_name": f"rows.txt.{packed}"})
    with pytest.raises(
        DataError, match=rf"rows.txt.{packed} cannot be unpacked: .*Required: a whole"
    ):
        rows_of(found)
    assert not Path(found.files[0].path).exists()


def test_a_compressed_table_is_refused(folder: Path) -> None:
    (folder / "rows.parquet.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"rows.parquet.gz is compressed. Required: a compressed"):
        describe(folder, {"file_name": "rows.parquet.gz"})


@pytest.fixture
def cloud() -> Any:
    import fsspec

    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def test_files_of_cloud_storage_are_fetched_when_they_are_read(folder: Path, cloud: Any) -> None:
    cloud.pipe("/bucket/b.json", CONTENTS["json"])
    cloud.pipe("/bucket/a.json", json.dumps([{**ROW, "output": "c"}]).encode())
    whole = describe(folder, {"cloud_file_name": "memory://bucket"})
    assert [file.name for file in whole.files] == [
        "memory://bucket/a.json",
        "memory://bucket/b.json",
    ]
    assert not any(Path(file.path).exists() for file in whole.files)
    assert [row["output"] for row in rows_of(whole)] == ["c", "b", "b"]
    one = describe(folder, {"cloud_file_name": "memory://bucket/a.json"})
    assert rows_of(one) == rows_of(whole)[:1]


def test_compressed_files_of_cloud_storage(folder: Path, cloud: Any) -> None:
    cloud.pipe("/bucket/a.jsonl.gz", gzip.compress(CONTENTS["jsonl"]))
    assert rows_of(describe(folder, {"cloud_file_name": "memory://bucket/a.jsonl.gz"})) == [ROW] * 2


def test_the_identity_of_a_cloud_file_is_its_etag_and_reads_nothing(
    folder: Path, cloud: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud.pipe("/bucket/a.json", CONTENTS["json"])
    entry = {"cloud_file_name": "memory://bucket/a.json"}
    known = cloud.info("/bucket/a.json")
    digests = identity.Digests(folder / "digests")

    def described(etag: str) -> Any:
        monkeypatch.setattr(type(cloud), "info", lambda *a, **k: {**known, "ETag": etag})
        return identity._set(describe(folder, entry), digests, 0)["files"]

    monkeypatch.setattr(type(cloud), "open", None)
    assert described("one") == [["json", "memory://bucket/a.json etag one"]]
    assert described("one") == described("one") != described("two")


def test_a_cloud_file_that_changes_is_fetched_again(folder: Path, cloud: Any) -> None:
    entry = {"cloud_file_name": "memory://bucket/a.jsonl"}
    for text in ("a", "bc"):
        cloud.pipe("/bucket/a.jsonl", json.dumps({"text": text}).encode())
        assert rows_of(describe(folder, entry)) == [{"text": text}]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("memory://bucket/none.json", ["does not exist", "Mend cloud_file_name"]),
        ("s3://bucket/a.json", ["pip install s3fs"]),
        ("gs://bucket/a.json", ["pip install gcsfs"]),
        ("what://bucket/a.json", ["a storage that is not known"]),
    ],
)
def test_cloud_files_that_cannot_be_had(
    folder: Path, cloud: Any, monkeypatch: pytest.MonkeyPatch, url: str, words: list[str]
) -> None:
    for package in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError) as error:
        describe(folder, {"cloud_file_name": url})
    for word in [url, *words]:
        assert word in str(error.value)
