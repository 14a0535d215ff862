"""Data prepared once for a cluster, or once for each of its stores."""

import json
import re
from pathlib import Path

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


def test_shards_of_one_build_are_made_on_all_nodes(launch, ray_address, tmp_path):
    shared = {"environ": {"LLMRAY_CACHE": str(tmp_path / "shared")}}
    keys = {"command": "prepare", "before": SMALL_SHARDS, "data_shared_file_system": True}
    together = launch("together", address=ray_address, **keys, **shared)
    assert together.finish() == 0, together.text
    counts = re.search(r"(\d+) shard\(s\) prepared by the cluster: (.*)", together.text)
    by_node = dict(part.split(" on ")[::-1] for part in counts.group(2).split(", "))
    assert sum(map(int, by_node.values())) == int(counts.group(1)) > 5
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
    again = launch("together-again", address=ray_address, **keys, **shared)
    assert again.finish() == 0, again.text
    assert "prepared by the cluster" not in again.text
    anew = launch("anew", address=ray_address, overwrite_cache=True, **keys, **shared)
    assert anew.finish() == 0, anew.text
    assert anew.text.count("prepared by the cluster") == 1


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
    was_sent = "127.0.0.2 does not see the data files" in run.text
    assert was_sent is not sees_files
    first, second = prepared_in(tmp_path / "first"), prepared_in(tmp_path / "second")
    assert first == second
    assert len(first) == 1
    log = [json.loads(x) for x in (run.output_dir / "trainer_log.jsonl").read_text().splitlines()]
    assert len(log) == 2
