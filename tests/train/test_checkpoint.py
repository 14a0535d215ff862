"""Checkpoints: what is saved comes back to the bit, and the right one is found."""

import logging
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmray import store
from llmray.errors import CheckpointError, StoreError
from llmray.train import checkpoint
from llmray.train.parallel import World
from llmray.train.state_files import read_state, write_state

WORLD = World.single(torch.device("cpu"))
IDENTITY = {"model": "m", "data": "d"}


@pytest.fixture(params=["local", "uri"])
def run_dir(request, tmp_path):
    (tmp_path / "run").mkdir()
    return f"file://{tmp_path}/run" if request.param == "uri" else f"{tmp_path}/run"


def local(path):
    return Path(path.removeprefix("file://"))


def save(run_dir, step, *, keep=None, spare=None, identity=IDENTITY, state=None, files=None):
    return checkpoint.save(
        run_dir,
        step,
        world=WORLD,
        replicated={"engine": {"step": step, "w": torch.full((3,), float(step))}}
        if state is None
        else state,
        per_rank={"random": {"seed": step}} if state is None else {},
        write_files=files or (lambda path: (path / "adapter_config.json").write_text("{}")),
        fingerprint={"identity": identity, "arguments": {"learning_rate": 1e-4}},
        keep=keep,
        spare=spare,
    )


def find(run_dir, requested=None, identity=None):
    return checkpoint.find(run_dir, requested, world=WORLD, identity=identity)


def damage(path, name="state/replicated-000.safetensors"):
    file = local(path) / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def names(run_dir):
    return sorted(os.listdir(local(run_dir)))


def test_state_comes_back_equal_to_the_bit(tmp_path):
    base = torch.arange(12, dtype=torch.float32)
    state = {
        "half": torch.randn(3, dtype=torch.bfloat16),
        "scalar": torch.tensor(math.pi, dtype=torch.float64),
        "bytes": torch.randint(0, 255, (5,), dtype=torch.uint8),
        "transposed": base.view(3, 4).t(),
        "shared": [base, base[2:5]],
        "empty": torch.empty(0, 4),
        "values": {"list": [1, 2**70, 0.1, True, None, "text"], "tuple": (1, (2, "x"))},
        "inf": [math.inf, -math.inf],
        "numbered": {0: {"step": torch.tensor(3.0)}, 1: "one"},
        "$dollar": {"$tensor": "not one"},
    }
    write_state(tmp_path / "state", "part", state)
    back = read_state(tmp_path / "state", "part")
    assert list(back) == list(state)
    for key in ("half", "scalar", "bytes", "transposed", "empty"):
        assert back[key].dtype == state[key].dtype
        assert torch.equal(back[key], state[key])
    assert torch.equal(back["shared"][0], base)
    assert torch.equal(back["shared"][1], base[2:5])
    for key in ("values", "inf", "$dollar"):
        assert back[key] == state[key]
    assert back["numbered"][1] == "one"
    assert back["numbered"][0]["step"].item() == 3.0


def test_state_beyond_one_file_is_split(tmp_path, monkeypatch):
    monkeypatch.setattr("llmray.train.state_files.MAX_FILE_BYTES", 100)
    state = {str(i): torch.full((10,), float(i)) for i in range(5)}
    assert len(write_state(tmp_path / "state", "part", state)) == 1 + 3  # 40 bytes each
    back = read_state(tmp_path / "state", "part")
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_state_of_nothing_but_an_empty_tensor(tmp_path):
    write_state(tmp_path / "state", "part", {"empty": torch.empty(0, 4)})
    assert read_state(tmp_path / "state", "part")["empty"].shape == (0, 4)


def test_state_of_another_kind_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match="part/a/1 is a set"):
        write_state(tmp_path / "state", "part", {"a": [1, {2}]})


def test_saved_is_found_and_loaded(run_dir):
    path = save(run_dir, 5)
    found = find(run_dir)
    assert (found.path, found.step, found.world_size) == (path, 5, 1)
    assert found.fingerprint["identity"] == IDENTITY
    state = checkpoint.load(path, rank=0)
    assert torch.equal(state["engine"]["w"], torch.full((3,), 5.0))
    assert state["random"] == {"seed": 5}
    assert checkpoint.load(path, rank=7).keys() == {"engine"}
    assert (local(path) / "adapter_config.json").read_text() == "{}"
    assert not list(local(path).rglob("*.p*t")) + list(local(path).rglob("*.bin"))


def test_newest_is_taken_and_false_takes_none(run_dir):
    assert find(run_dir) is None
    for step in (5, 10, 100):
        save(run_dir, step)
    assert find(run_dir).step == 100
    assert find(run_dir, True).step == 100
    assert find(run_dir, store.join(run_dir, "checkpoint-10")).step == 10
    assert find(run_dir, False) is None


@pytest.mark.parametrize("requested", [None, True])
def test_damaged_and_unfinished_ones_are_passed_over_with_a_word(run_dir, requested, caplog):
    save(run_dir, 5)
    damage(save(run_dir, 10))
    (local(run_dir) / "checkpoint-15").mkdir()
    with caplog.at_level(logging.WARNING, "llmray"):
        assert find(run_dir, requested).step == 5
    said = caplog.text
    assert "checkpoint-15 has no manifest.json" in said
    assert "checkpoint-10 is damaged: state/replicated-000.safetensors" in said
    assert "Going on from" in said


def test_named_and_damaged_is_an_error(run_dir):
    save(run_dir, 5)
    path = save(run_dir, 10)
    damage(path)
    with pytest.raises(CheckpointError, match=r"names .*checkpoint-10, and .* is damaged: state"):
        find(run_dir, path)
    with pytest.raises(CheckpointError, match=r"checkpoint-7: .* has no manifest.json"):
        find(run_dir, store.join(run_dir, "checkpoint-7"))


def test_requested_where_there_is_none_is_an_error(run_dir):
    with pytest.raises(CheckpointError, match="holds no checkpoint that a run can go on from"):
        find(run_dir, True)
    damage(save(run_dir, 5))
    with pytest.raises(CheckpointError, match=r"checkpoint-5 is damaged.*requires one"):
        find(run_dir, True)


def test_checkpoints_of_another_run_are_passed_over_if_one_fits(run_dir, caplog):
    save(run_dir, 5)
    other = {"model": "other", "data": "d"}
    save(run_dir, 10, identity=other)
    with caplog.at_level(logging.WARNING, "llmray"):
        assert find(run_dir, None, IDENTITY).step == 5
    assert "checkpoint-10 belongs to another run" in caplog.text
    assert find(run_dir, None, other).step == 10
    assert find(run_dir, None, {"model": "third"}).step == 10  # for the caller to refuse


def test_weights_alone_are_never_resumed_from(run_dir, caplog):
    save(run_dir, 5)
    path = save(run_dir, 10, state={})
    assert not (local(path) / "state").exists()
    with caplog.at_level(logging.WARNING, "llmray"):
        assert find(run_dir).step == 5
    assert "save_only_model" in caplog.text
    with pytest.raises(CheckpointError, match="weights alone"):
        find(run_dir, path)


def test_rotation_keeps_the_newest(run_dir):
    for step in (2, 4, 6, 8):
        save(run_dir, step, keep=2)
    assert names(run_dir) == ["checkpoint-6", "checkpoint-8"]


@pytest.mark.parametrize(
    ("keep", "left"),
    [(1, [10, 50]), (2, [10, 50]), (3, [10, 40, 50]), (None, [10, 20, 30, 40, 50])],
)
def test_rotation_spares_the_best(run_dir, keep, left):
    """The best counts among those that are kept, and the newest stays beside it."""
    for step in (10, 20, 30, 40, 50):
        save(run_dir, step, keep=keep, spare=10)
    assert names(run_dir) == [f"checkpoint-{step}" for step in left]


def test_a_part_of_the_state_is_read_alone(run_dir, monkeypatch):
    weights = {"a.b": torch.arange(3.0), "c": torch.ones(2, dtype=torch.bfloat16)}
    state = {"engine": {"trainable": weights, "optimizer": {"a.b": {"m": torch.zeros(9)}}}}
    save(run_dir, 10, state=state)
    back = checkpoint.load_part(run_dir, 10, "engine", "trainable")
    assert {name: value.tolist() for name, value in back.items()} == {
        "a.b": [0.0, 1.0, 2.0],
        "c": [1.0, 1.0],
    }
    assert back["c"].dtype == torch.bfloat16
    damage(f"{run_dir}/checkpoint-10")
    with pytest.raises(CheckpointError, match=r"The best checkpoint cannot be read.*checkpoint-10"):
        checkpoint.load_part(run_dir, 10, "engine", "trainable")


def test_rotation_keeps_what_was_just_written_where_a_later_one_is_damaged(run_dir):
    """A run that fell back from a damaged checkpoint-100 to 50 must not lose 60 to rotation."""
    save(run_dir, 50)
    damage(save(run_dir, 100))
    save(run_dir, 60, keep=1)
    assert names(run_dir) == ["checkpoint-100", "checkpoint-60"]
    assert find(run_dir).step == 60


def test_saving_again_replaces_a_damaged_one(run_dir):
    damage(save(run_dir, 5))
    save(run_dir, 5)
    assert find(run_dir).step == 5
    assert names(run_dir) == ["checkpoint-5"]


def test_a_save_that_fails_leaves_nothing(run_dir):
    def full(directory):
        (directory / "half").write_text("x")
        raise OSError(28, "No space left on device")

    save(run_dir, 5)
    with pytest.raises(StoreError, match=r"checkpoint-10 could not be written.*disk is full"):
        save(run_dir, 10, files=full)
    assert names(run_dir) == ["checkpoint-5"]


def test_a_save_that_meets_a_defect_names_it(run_dir):
    def broken(directory):
        raise KeyError("lora_A")

    with pytest.raises(CheckpointError, match=r"Rank 0 failed .*KeyError: 'lora_A'") as caught:
        save(run_dir, 10, files=broken)
    assert isinstance(caught.value.__cause__, KeyError)


def test_aside_moves_what_a_run_wrote_and_nothing_else(run_dir, caplog):
    save(run_dir, 5)
    save(run_dir, 10)
    for name in ("trainer_log.jsonl", "adapter_model.safetensors", "notes.txt"):
        (local(run_dir) / name).write_text("mine")
    with caplog.at_level(logging.WARNING, "llmray"):
        checkpoint.aside(run_dir)
    assert names(run_dir) == [".replaced", "notes.txt"]
    assert names(store.join(run_dir, ".replaced")) == [
        "adapter_model.safetensors",
        "checkpoint-10",
        "checkpoint-5",
        "trainer_log.jsonl",
    ]
    assert "4 earlier files and checkpoints were moved" in caplog.text
    assert "MB" in caplog.text
    checkpoint.aside(run_dir)
    assert names(store.join(run_dir, ".replaced")) != []
    save(run_dir, 7)
    checkpoint.aside(run_dir)
    assert names(store.join(run_dir, ".replaced")) == ["checkpoint-7"]


@pytest.mark.parametrize(
    ("requested", "overwrite", "left"),
    [
        (None, False, [5, 10, 15]),
        (None, True, []),
        (True, True, [5, 10, 15]),
        (False, False, []),
        ("checkpoint-10", False, [5, 10]),
        ("checkpoint-10", True, [5, 10]),
    ],
)
def test_way_is_cleared_once_for_a_new_run(run_dir, requested, overwrite, left):
    for step in (5, 10, 15):
        save(run_dir, step)
    wanted = store.join(run_dir, requested) if isinstance(requested, str) else requested
    checkpoint.clear_way(run_dir, wanted, overwrite=overwrite)
    found = [int(n.rpartition("-")[2]) for n in names(run_dir) if n.startswith("checkpoint-")]
    assert sorted(found) == left
    assert checkpoint.newest_step(run_dir) == (max(left) if left else None)


def test_differences_name_both_values():
    old = {"learning_rate": 1e-4, "seed": 1, "resume_from_checkpoint": None, "gone": 3}
    new = {"learning_rate": 2e-4, "seed": 1, "resume_from_checkpoint": True}
    assert checkpoint.differences(old, new) == [
        "gone: 3 there, None here",
        "learning_rate: 0.0001 there, 0.0002 here",
    ]


RANK_CODE = """
import sys, torch
from llmray.errors import LlmrayError
from llmray.train import checkpoint
from llmray.train.parallel import World
world, run_dir, mode = World.from_environment(60), sys.argv[1], sys.argv[2]
def write_files(path):
    (path / "weights.bin").write_bytes(b"w" * 100)
    if mode == "full":
        raise OSError(28, "No space left on device")
try:
    state = {"x": object()} if mode == "rank-1" and world.rank == 1 else {"rank": world.rank}
    checkpoint.save(run_dir, 4, world=world, replicated={"e": {"w": torch.ones(2)}},
                    per_rank={"random": state}, write_files=write_files,
                    fingerprint={"identity": {}}, keep=1)
    found = checkpoint.find(run_dir, None, world=world)
    print("found", found.step, found.world_size, checkpoint.load(found.path, rank=world.rank))
except LlmrayError as error:
    print(type(error).__name__, error)
world.close()
"""


def ranks(run_dir, mode):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_CODE, run_dir, mode],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    return [process.communicate(timeout=800)[0].strip() for process in processes]


def test_two_ranks_make_one_commit(run_dir):
    said = ranks(run_dir, "good")
    for rank in range(2):
        assert said[rank].startswith("found 4 2 ")
        assert f"'random': {{'rank': {rank}}}" in said[rank]
    files = set(store.verify(store.join(run_dir, "checkpoint-4")).files)
    assert {"weights.bin", "state/rank-00000.json", "state/rank-00001.json"} <= files
    assert names(run_dir) == ["checkpoint-4"]


@pytest.mark.parametrize(
    ("mode", "error"), [("full", "StoreError"), ("rank-1", "CheckpointError Rank 1 failed")]
)
def test_the_failure_of_one_rank_reaches_both(tmp_path, mode, error):
    said = ranks(str(tmp_path / "run"), mode)
    assert all(line.startswith(error) for line in said), said
    assert names(str(tmp_path / "run")) == []
