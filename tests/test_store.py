"""The store: all or nothing, damage found, dead writers swept; on local paths and on URIs."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmray import store, temporary
from llmray.errors import StoreError


@pytest.fixture(params=["local", "uri"])
def place(request, tmp_path):
    """The name of something to commit, on a local path and through pyarrow."""
    parent = tmp_path / "store"
    parent.mkdir()
    return f"file://{parent}/thing" if request.param == "uri" else f"{parent}/thing"


def local(place):
    return Path(place.removeprefix("file://"))


def write(place, content=b"abc", metadata=None):
    with store.staging(place) as directory:
        (directory / "a.bin").write_bytes(content)
        (directory / "sub").mkdir()
        (directory / "sub" / "b.txt").write_text("text")
        store.commit(directory, place, metadata)


def leftovers(place):
    return [name for name in os.listdir(local(place).parent) if name.startswith(temporary.PREFIX)]


def test_commit_is_read_back_with_sums_and_metadata(place):
    """CRC-32 of b"abc" is 0x352441C2, the check value of the algorithm's common tables."""
    write(place, metadata={"rows": 3, "nested": {"tuple": (1, 2)}})
    manifest = store.verify(place)
    assert manifest.files["a.bin"] == store.FileSum(3, 0x352441C2)
    assert set(manifest.files) == {"a.bin", "sub/b.txt"}
    assert manifest.metadata == {"rows": 3, "nested": {"tuple": [1, 2]}}
    assert store.is_committed(place)
    assert store.list_committed(os.path.dirname(place), "th*") == [place]
    assert leftovers(place) == []


def test_commit_replaces_what_was_there_with_all_its_files(place):
    with store.staging(place) as directory:
        (directory / "old.bin").write_bytes(b"old")
        store.commit(directory, place)
    write(place, b"new")
    assert sorted(os.listdir(local(place))) == ["a.bin", "manifest.json", "sub"]
    assert store.read_bytes(f"{place}/a.bin") == b"new"
    assert leftovers(place) == []


def test_nothing_is_left_of_a_writer_that_fails(place):
    def fail():
        with store.staging(place) as directory:
            (directory / "a.bin").write_bytes(b"half")
            raise ValueError("the writer's own error")

    with pytest.raises(ValueError, match="own error"):
        fail()
    assert not store.is_committed(place)
    assert leftovers(place) == []


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: flip_bit(path / "a.bin"), "a.bin has other content"),
        (lambda path: (path / "a.bin").write_bytes(b"ab"), "a.bin has 2 bytes, committed were 3"),
        (lambda path: (path / "sub" / "b.txt").unlink(), "sub/b.txt is missing"),
        (lambda path: flip_bit(path / "manifest.json"), "manifest.json"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json is not readable"),
        (lambda path: (path / "manifest.json").unlink(), "has no manifest.json"),
    ],
)
def test_damage_is_found_and_named(place, damage, said):
    write(place)
    damage(local(place))
    with pytest.raises(StoreError, match=said):
        store.verify(place)


def test_parts_of_several_writers_make_one_commit(tmp_path):
    target = tmp_path / "checkpoint-3"
    directory = store.open_staging(target)
    (directory / "rank-0.bin").write_bytes(b"zero")
    sums = store.seal(directory, ["rank-0.bin"])
    (directory / "rank-1.bin").write_bytes(b"one")
    sums |= store.seal(directory, ["rank-1.bin"])
    assert not target.exists()
    store.commit(directory, target, None, sums)
    assert set(store.verify(target).files) == {"rank-0.bin", "rank-1.bin"}


def test_removed_is_gone_and_removing_nothing_is_fine(place):
    write(place)
    store.remove(place)
    store.remove(place)
    assert store.list_names(os.path.dirname(place)) == []


def test_committed_names_come_in_natural_order(tmp_path):
    for step in (100, 20, 3):
        write(str(tmp_path / f"checkpoint-{step}"))
    (tmp_path / "checkpoint-50").mkdir()
    names = [Path(path).name for path in store.list_committed(tmp_path, "checkpoint-*")]
    assert names == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]


def test_write_atomic_replaces_and_leaves_no_half(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.json"
    store.write_atomic(path, "one")

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StoreError, match=r"file.json could not be written.*disk is full: free"):
        store.write_atomic(path, "two")
    assert path.read_text() == "one"
    assert os.listdir(path.parent) == ["file.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_and_file_in_the_way_say_what_to_do(tmp_path):
    with (
        pytest.raises(StoreError, match="disk is full") as caught,
        store.explained("/dev/full"),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"x")
    assert caught.value.errno == errno.ENOSPC
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="a directory is required"):
        store.open_staging(tmp_path / "file" / "thing")


def test_a_writer_that_was_killed_is_swept_and_one_at_work_is_not(tmp_path):
    code = (
        "import sys, time; from llmray import store\n"
        "d = store.open_staging(sys.argv[1]); (d / 'half').write_text('x')\n"
        "print('ready', flush=True); time.sleep(900)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "thing")]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"ready\n"
        assert store.sweep(tmp_path) == []
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    [name] = os.listdir(tmp_path)
    assert store.list_committed(tmp_path) == []
    assert store.sweep(tmp_path) == [name]
    assert os.listdir(tmp_path) == []


def test_of_another_machine_only_old_work_is_swept(tmp_path):
    fresh, old = tmp_path / ".tmp-a-00000000-1-5-abc", tmp_path / ".tmp-b-00000000-1-5-abc"
    for path in (fresh, old):
        path.mkdir()
    long_ago = time.time() - temporary.STALE_AFTER_S - 10
    os.utime(old, (long_ago, long_ago))
    assert store.sweep(tmp_path) == [old.name]


def test_fetch_upload_and_download(tmp_path):
    source, there, back = tmp_path / "source", f"file://{tmp_path}/there", tmp_path / "back"
    (source / "deep").mkdir(parents=True)
    (source / "log.jsonl").write_text("{}\n")
    (source / "deep" / "x").write_text("x")
    (source / ".tmp-half").write_text("half")
    store.upload(source, there)
    assert store.list_names(there) == ["deep", "log.jsonl"]
    assert store.fetch(there, ["log.jsonl", "none.json"], back) == ["log.jsonl"]
    assert (back / "log.jsonl").read_text() == "{}\n"
    store.download(there, tmp_path / "all")
    assert (tmp_path / "all" / "deep" / "x").read_text() == "x"


def test_upload_leaves_out_what_vanished_where_that_is_allowed(tmp_path, monkeypatch):
    source, there = tmp_path / "source", f"file://{tmp_path}/there"
    source.mkdir()
    (source / "kept").write_text("kept")
    monkeypatch.setattr(store, "walk", lambda directory: iter(["gone", "kept"]))
    with pytest.raises(StoreError, match="gone"):
        store.upload(source, there)
    store.upload(source, there, may_vanish=True)
    assert store.list_names(there) == ["kept"]


def test_unknown_scheme_names_the_known_ones():
    with pytest.raises(StoreError, match=r"nope://bucket/x is not a URI.*s3://"):
        store.list_names("nope://bucket/x")
