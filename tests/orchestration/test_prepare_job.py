"""Data prepared once for a cluster, or once for each of its stores."""

import json
import os
import re
import signal
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from llmray import store
from tests.orchestration.conftest import start_cluster

pytestmark = pytest.mark.ray

SMALL_SHARDS = "from llmray.data import planning; planning.LEAST_SHARD_BYTES = 600"


def prepared_in(cache):
    """The prepared data in a cache, by key, as the bytes of its files."""
    return {
        Path(path).name: {file.name: file.read_bytes() for file in Path(path).glob("*.arrow")}
        for path in store.list_committed(Path(cache, "prepared"))
    }


def tokenized(run):
    """How many rows each node of a shared build tokenized, by its address, and of which shards."""
    counts = re.search(r"(\d+) shard\(s\), (\d+) rows prepared by the cluster: (.*);", run.text)
    by_node = dict(part.split(" on ")[::-1] for part in counts.group(3).split(", "))
    assert sum(map(int, by_node.values())) == int(counts.group(1))
    return int(counts.group(2)), by_node


def test_shards_of_one_build_are_made_on_all_nodes(launch, ray_address, tmp_path):
    """Each row is tokenized once, also where two workers train and two jobs start at once."""
    shared = {"environ": {"LLMRAY_CACHE": str(tmp_path / "shared")}}
    keys = {"before": SMALL_SHARDS, "data_shared_file_system": True, **shared}
    together = launch("together", address=ray_address, command="prepare", **keys)
    beside = launch("beside", address=ray_address, command="prepare", **keys)
    alone = launch(
        "alone-prepared",
        address=None,
        use_ray=False,
        command="prepare",
        before=SMALL_SHARDS,
        environ={"LLMRAY_CACHE": str(tmp_path / "alone")},
    )
    assert together.finish() == 0, together.text
    assert beside.finish() == 0, beside.text
    [builder] = [run for run in (together, beside) if "prepared by the cluster" in run.text]
    num_rows, by_node = tokenized(builder)
    assert num_rows == 64
    assert len(by_node) == 3
    assert alone.finish() == 0, alone.text
    assert prepared_in(tmp_path / "shared") == prepared_in(tmp_path / "alone")
    anew = launch(
        "anew",
        address=ray_address,
        overwrite_cache=True,
        placement_strategy="STRICT_SPREAD",
        max_steps=1,
        save_strategy="no",
        **keys,
    )
    assert anew.finish() == 0, anew.text
    assert len(set(anew.nodes())) == 2
    assert anew.text.count("prepared by the cluster") == 1
    assert tokenized(anew)[0] == 64


def finished_shards(cache):
    """When each finished shard of a build that goes on was written, by name."""
    notes = Path(cache, "prepared").glob("*.building/shard-*.json")
    return {path.name: path.stat().st_mtime_ns for path in notes}


def builders(session_dir):
    """Processes of a cluster that build a shard."""
    found = []
    for process in psutil.process_iter(["cmdline", "ppid"]):
        if "ray::_build_shard" not in " ".join(process.info["cmdline"] or []):
            continue
        try:
            words = psutil.Process(process.info["ppid"]).cmdline()
        except psutil.NoSuchProcess:
            continue
        if os.path.basename(session_dir) in " ".join(words):
            found.append(process)
    return found


def wait_for(condition, run):
    """What a condition gives as soon as that is something."""
    deadline = time.monotonic() + 600
    while not (found := condition()):
        assert time.monotonic() < deadline, run.text
        time.sleep(0.01)
    return found


def test_builders_that_are_killed_repeat_the_shards_in_flight_alone(launch, ray_cluster, tmp_path):
    """A task is killed, then its driver; the next build is stopped by a signal, the last one ends.

    No finished shard is built again.
    """
    rows = [{"instruction": f"Say {i}.", "output": "w x y z " * 4000} for i in range(240)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    cache = tmp_path / "cache"
    keys = {
        "address": ray_cluster[0],
        "command": "prepare",
        "before": "from llmray.data import planning; planning.LEAST_SHARD_BYTES = 300_000",
        "environ": {"LLMRAY_CACHE": str(cache)},
        "dataset_dir": str(tmp_path),
        "data_shared_file_system": True,
    }
    at_work = partial(builders, ray_cluster[1])

    def more_shards(count):
        return len(finished_shards(cache)) >= count

    first = launch("killed", **keys)
    wait_for(lambda: more_shards(2), first)
    builder = wait_for(at_work, first)[0]
    builder.kill()
    count = len(finished_shards(cache))
    wait_for(lambda: more_shards(count + 4), first)  # Ray repeats the task
    os.killpg(first.process.pid, signal.SIGKILL)
    first.finish()
    wait_for(lambda: not at_work(), first)
    killed = finished_shards(cache)
    second = launch("stopped", **keys)
    wait_for(lambda: more_shards(len(killed) + 2), second)
    second.process.send_signal(signal.SIGTERM)
    assert second.finish() == 143, second.text
    assert "stopped by SIGTERM; finished shards are kept" in second.text
    wait_for(lambda: not at_work(), second)
    stopped = finished_shards(cache)
    assert killed.items() < stopped.items()
    last = launch("whole", **keys)
    assert last.finish() == 0, last.text
    [path] = store.list_committed(cache / "prepared")
    notes = {path.name: path.stat().st_mtime_ns for path in Path(path).glob("shard-*.json")}
    assert stopped.items() <= notes.items()
    assert f"{len(stopped)} shard(s) were there" in last.text
    left = [json.loads(Path(path, name).read_text()) for name in notes if name not in stopped]
    assert tokenized(last)[0] == sum(note["counts"]["read"] for note in left) > 0


def test_a_node_with_a_store_of_its_own_gets_the_data_once(launch, run_keys, tmp_path):
    """Prepared there from the files, or sent where the node does not see them."""
    dataset_dir = Path(run_keys["dataset_dir"])
    driver = tmp_path / "driver"
    driver.mkdir()
    for name in ("rows.json", "dataset_info.json"):
        (driver / name).write_bytes((dataset_dir / name).read_bytes())
    stores = tmp_path / "first", tmp_path / "second"
    environ = {"LLMRAY_CACHE": str(stores[0])}
    words = ["1", f"127.0.0.2={stores[1]}"]
    with start_cluster(words, cwd=tmp_path, RAY_AUTH_MODE="token") as (address, *_):
        seen = launch("two-stores", address=address, command="prepare", environ=environ)
        assert seen.finish() == 0, seen.text
        assert rows_by_node(seen) == [64, 64]
        first = prepared_in(stores[0])
        assert prepared_in(stores[1]) == first
        assert len(first) == 1
        anew = launch(
            "two-stores",
            address=address,
            environ=environ,
            overwrite_cache=True,
            placement_strategy="STRICT_SPREAD",
            max_steps=2,
            save_strategy="no",
        )
        assert anew.finish() == 0, anew.text
        assert rows_by_node(anew) == [64, 64]
        assert [record["current_steps"] for record in anew.log()] == [1, 2]
        # this path leads to another folder in every process
        blind = {
            "address": address,
            "command": "prepare",
            "before": f"import os; os.chdir({str(driver)!r})",
            "environ": environ,
            "dataset_dir": "/proc/self/cwd",
        }
        sent = launch("sent", cutoff_len=100, **blind)
        assert sent.finish() == 0, sent.text
        assert rows_by_node(sent) == [64]
        both = prepared_in(stores[0])
        assert prepared_in(stores[1]) == both
        assert both.items() > first.items()
        # now the other node sees the same path lead to another file
        rows = json.loads((driver / "rows.json").read_text())[1:]
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        (tmp_path / "dataset_info.json").write_bytes((driver / "dataset_info.json").read_bytes())
        differs = launch("differs", cutoff_len=90, **blind)
        assert differs.finish() == 1, differs.text
    assert "127.0.0.2 does not see the data files" in sent.text
    assert "does not see the data files" not in seen.text + anew.text
    assert "The data set does not come out the same on all nodes" in differs.text
    said = r"rows\.json on \S+ is not that on 127\.0\.0\.2"
    assert re.search(said, differs.text), differs.text


def rows_by_node(run):
    """How many rows each node with a store of its own tokenized."""
    said = re.search("prepared on each node that needs it: (.*)", run.text).group(1)
    return [int(part.split(" rows on ")[0]) for part in said.split(", ")]
