"""Stages dpo, kto and rm on a cluster: two workers learn what one process without Ray does."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from preference_rows import write_preferences
from safetensors.torch import load_file

from llmray import local
from llmray.arguments.loading import load
from llmray.train.observers import read_log

pytestmark = pytest.mark.ray

LORA = {"finetuning_type": "lora", "lora_rank": 4, "learning_rate": 0.01}
STEPS = {"max_steps": 6, "save_steps": 3, "gradient_accumulation_steps": 4}
STAGES: dict[str, dict[str, Any]] = {
    # what it compares with is of the whole step, and the mean of rewards is learned
    "dpo": {**LORA, "pref_loss": "kto_pair", "pref_bco_weight": 0.5, "precompute_ref_logps": False},
    # the reference is asked once, by both workers, and given up
    "kto": {"dataset": "judged", "pref_beta": 0.5, "max_steps": 3, "save_strategy": "no"},
    "rm": {**LORA, "max_steps": 3, "save_strategy": "no"},
}


def log(output: Path) -> list[dict[str, float]]:
    """The records of a run, without what the clock says."""
    clock = ("second", "time", "runtime")
    return [
        {k: v for k, v in record.items() if isinstance(v, float) and not any(c in k for c in clock)}
        for record in read_log(output / "trainer_log.jsonl")
    ]


def weights(output: Path) -> dict[str, Any]:
    """What was learned."""
    return {k: v for path in output.glob("*.safetensors") for k, v in load_file(path).items()}


def test_two_workers_equal_one_process_also_when_one_of_them_dies(
    launch, ray_address, nothing_runs, tmp_path
):
    """Of dpo a worker is killed: the reference and what the loss has learned are as before."""
    write_preferences(tmp_path, 48, 3)
    for stage, more in STAGES.items():
        keys = {"stage": stage, "dataset": "pairs", "dataset_dir": str(tmp_path), **STEPS, **more}
        run = launch(f"{stage}-together", address=ray_address, **keys)
        if stage == "dpo":
            pids = run.pids()
            run.wait_for(r"step 4/6")
            os.kill(pids[1], signal.SIGKILL)
        assert run.finish() == 0, run.text
        assert ("attempt 2" in run.text) == (stage == "dpo")
        alone = {"use_ray": False, "per_device_train_batch_size": 4, "save_strategy": "no"}
        output = tmp_path / stage
        arguments = load({**run.keys, **alone, "output_dir": str(output)}, environ={})
        assert local.train(arguments) == 0
        records = log(run.output_dir), log(output)
        assert len(records[0]) == len(records[1]) == run.keys["max_steps"]
        for ours, theirs in zip(*records, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5), stage
        assert abs(records[0][-1]["loss"] - records[0][0]["loss"]) > 0.01, "it learns"
        ours, theirs = weights(run.output_dir), weights(output)
        assert ours.keys() == theirs.keys()
        assert ("v_head.summary.weight" in ours) == (stage == "rm")
        for name, tensor in ours.items():
            assert float((tensor - theirs[name]).abs().max()) < 1e-5, (stage, name)
    nothing_runs()
