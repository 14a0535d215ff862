"""Data prepared once for a cluster, or once for each of its stores."""

import json
import os
import re
import signal
import time
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
    assert together.finish() == 0, together.text
    assert beside.finish() == 0, beside.text
    [builder] = [run for run in (together, beside) if "prepared by the cluster" in run.text]
    num_rows, by_node = tokenized(builder)
    assert num_rows == 64
    assert len(by_node) == 3
    alone = launch(
        "alone-prepared",
        address=None,
        use_ray=False,
        command="prepare",
        before=SMALL_SHARDS,
        environ={"LLMRAY_CACHE": str(tmp_path / "alone")},
    )
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


def wait_for_shards(cache, count, run):
    """Until so many shards are finished."""
    deadline = time.monotonic() + 120
    while len(finished_shards(cache)) < count:
        assert run.process.poll() is None, run.text
        assert time.monotonic() < deadline, run.text
        time.sleep(0.01)


def builders():
    """Processes that build a shard."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "ray::_build_shard" in " ".join(process.info["cmdline"] or []):
            found.append(process)
    return found


def test_builders_that_are_killed_repeat_the_shards_in_flight_alone(launch, ray_address, tmp_path):
    """A task is killed, then its driver; the next build is stopped by a signal, the last one ends.

    No finished shard is built again.
    """
    rows = [{"instruction": f"Say {i}.", "output": "w x y z " * 4000} for i in range(400)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    cache = tmp_path / "cache"
    keys = {
        "address": ray_address,
        "command": "prepare",
        "before": "from llmray.data import planning; planning.LEAST_SHARD_BYTES = 300_000",
        "environ": {"LLMRAY_CACHE": str(cache)},
        "dataset_dir": str(tmp_path),
        "data_shared_file_system": True,
    }
    first = launch("killed", **keys)
    wait_for_shards(cache, 2, first)
    builder = builders()[0]
    builder.kill()
    builder.wait(30)
    wait_for_shards(cache, len(finished_shards(cache)) + 5, first)  # Ray repeats the task
    os.killpg(first.process.pid, signal.SIGKILL)
    first.finish()
    while builders():
        time.sleep(0.05)
    killed = finished_shards(cache)
    second = launch("stopped", **keys)
    wait_for_shards(cache, len(killed) + 2, second)
    second.process.send_signal(signal.SIGTERM)
    assert second.finish() == 143, second.text
    assert "stopped by SIGTERM; finished shards are kept" in second.text
    while builders():
        time.sleep(0.05)
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


@pytest.mark.parametrize("sees_files", [True, False])
def test_a_node_with_a_store_of_its_own_gets_the_data_once(
    sees_files, launch, ray_home, run_keys, tmp_path
):
    """Prepared there from the files, or sent where the node does not see them."""
    dataset_dir = Path(run_keys["dataset_dir"])
    if not sees_files:
        # this path leads to another folder in every process
        driver = tmp_path / "driver"
        driver.mkdir()
        for name in ("rows.json", "dataset_info.json"):
            (driver / name).write_bytes((dataset_dir / name).read_bytes())
        dataset_dir = Path("/proc/self/cwd")
    words = ["1", f"127.0.0.2={tmp_path / 'second'}"]
    with start_cluster(words, cwd=tmp_path, RAY_AUTH_MODE="token") as (address, *_):
        before = "pass" if sees_files else f"import os; os.chdir({str(tmp_path / 'driver')!r})"
        run = launch(
            "two-stores",
            address=address,
            before=before,
            environ={"LLMRAY_CACHE": str(tmp_path / "first")},
            dataset_dir=str(dataset_dir),
            placement_strategy="STRICT_SPREAD",
            max_steps=2,
            save_strategy="no",
        )
        assert run.finish() == 0, run.text
        anew = launch(
            "two-stores-anew",
            address=address,
            before=before,
            command="prepare",
            environ={"LLMRAY_CACHE": str(tmp_path / "first")},
            dataset_dir=str(dataset_dir),
            overwrite_cache=True,
        )
        assert anew.finish() == 0, anew.text
    for each in (run, anew):
        built = re.search("prepared on each node that needs it: (.*)", each.text).group(1)
        rows = [part.split(" rows on ")[0] for part in built.split(", ")]
        assert rows == ["64", "64"] if sees_files else ["64"]
    was_sent = "127.0.0.2 does not see the data files" in run.text
    assert was_sent is not sees_files
    first, second = prepared_in(tmp_path / "first"), prepared_in(tmp_path / "second")
    assert first == second
    assert len(first) == 1
    log = [json.loads(x) for x in (run.output_dir / "trainer_log.jsonl").read_text().splitlines()]
    assert len(log) == 2


def test_nodes_whose_files_differ_are_told_with_the_file(launch, ray_home, run_keys, tmp_path):
    """The same path leads to another file on each node."""
    names = ("driver", "second")
    for number, name in enumerate(names):
        (tmp_path / name).mkdir()
        rows = json.loads(Path(run_keys["dataset_dir"], "rows.json").read_text())[number:]
        (tmp_path / name / "rows.json").write_text(json.dumps(rows))
        info = {"rows": {"file_name": "rows.json"}}
        (tmp_path / name / "dataset_info.json").write_text(json.dumps(info))
    words = ["1", f"127.0.0.2={tmp_path / 'cache'}"]
    with start_cluster(words, cwd=tmp_path / "second", RAY_AUTH_MODE="token") as (address, *_):
        run = launch(
            "differs",
            address=address,
            command="prepare",
            before=f"import os; os.chdir({str(tmp_path / 'driver')!r})",
            environ={"LLMRAY_CACHE": str(tmp_path / "first")},
            dataset_dir="/proc/self/cwd",
        )
        assert run.finish() == 1, run.text
    assert "The data set does not come out the same on all nodes" in run.text
    assert re.search(r"rows\.json on \S+ is not that on 127\.0\.0\.2", run.text)
