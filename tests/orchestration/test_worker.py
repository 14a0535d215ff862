"""What a worker makes of its job: where each attempt starts, and how ranks are told."""

import pytest
import torch

from llmray.arguments.loading import load
from llmray.orchestration.worker import arguments_of_attempt, describe_ranks
from llmray.train import checkpoint
from llmray.train.parallel import World


def save(directory, step):
    return checkpoint.save(
        str(directory),
        step,
        world=World.single(torch.device("cpu")),
        replicated={"engine": {"step": step}},
        per_rank={},
        write_files=None,
        fingerprint={"identity": {}},
        keep=None,
    )


def arguments(requested):
    keys = {"model_name_or_path": "m", "dataset": "d", "template": "default", "output_dir": "o"}
    return load({**keys, "stage": "sft", "resume_from_checkpoint": requested}, environ={})


@pytest.mark.parametrize(
    ("requested", "attempt", "committed", "expected"),
    [
        (None, 1, [], None),
        (True, 1, [4], True),
        (True, 2, [4], None),
        (True, 2, [], None),  # the first attempt died before its first save
        (False, 2, [4], None),
        ("named-10", 1, [12], "named-10"),
        ("named-10", 2, [12], None),  # committed by this run: go on from there
        ("named-10", 2, [10], "named-10"),
        ("named-10", 2, [], "named-10"),
    ],
)
def test_later_attempts_go_on_from_what_this_run_committed(
    tmp_path, requested, attempt, committed, expected
):
    named = save(tmp_path / "elsewhere", 10)
    for step in committed:
        save(tmp_path / "run", step)
    requested, expected = (named if word == "named-10" else word for word in (requested, expected))
    of_attempt = arguments_of_attempt(arguments(requested), str(tmp_path / "run"), attempt)
    assert of_attempt.training.resume_from_checkpoint == expected


def test_ranks_are_told_by_node():
    where = [("10.0.0.1", 5), ("10.0.0.1", 6), ("10.0.0.2", 5)]
    assert describe_ranks(where) == (
        "rank 0 (pid 5), rank 1 (pid 6) on 10.0.0.1; rank 2 (pid 5) on 10.0.0.2"
    )
