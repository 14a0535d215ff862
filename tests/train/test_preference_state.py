"""Each loss of preference, kto and rm beside each way to tune, by the engine alone.

The first loss has its closed form, margins rise, and what goes on from `state_dict()` ends with
the bits of what went on undisturbed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from preference_site import FIRST, LOSSES, Site, make_site

from llmray.arguments.rlhf import RlhfArguments
from llmray.assembly import Training
from llmray.batch import Batch
from llmray.train.engine import Engine
from llmray.train.losses import LearningObjective, Objective, RewardModeling
from llmray.train.preference import Judged, Preference

TUNING: dict[str, dict[str, Any]] = {
    "full": {"finetuning_type": "full", "learning_rate": 0.002},
    "lora": {},
    "qlora": {"quantization_bit": 4},
}
MIDWAY, STEPS = 3, 6


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return make_site(tmp_path_factory.mktemp("state"))


def copied(value: Any) -> Any:
    """A state of its own, as a file would keep it."""
    copy = lambda x: x.clone() if isinstance(x, torch.Tensor) else x  # noqa: E731
    return torch.utils._pytree.tree_map(copy, value)


def train(
    engine: Engine, objective: Objective, steps: Sequence[list[Batch]]
) -> list[dict[str, float]]:
    """The loss and the metrics of each step, whose sums are those of this one rank."""
    found = []
    for micro_batches in steps:
        output = engine.forward_backward(micro_batches, objective)
        engine.optim_step()
        metrics = {name: value.item() for name, value in output.metrics.items()}
        found.append({"loss": output.loss.item(), **metrics})
    return found


def objectives(stage: str) -> dict[str, Any]:
    """What is trained in a stage; each call gives new ones."""
    if stage == "rm":
        return {"rm": RewardModeling()}
    if stage == "kto":
        return {"kto": Judged(RlhfArguments(pref_beta=0.5))}
    found = {loss: Preference(RlhfArguments(pref_loss=loss)) for loss in LOSSES}
    bco = RlhfArguments(pref_loss="kto_pair", pref_bco_weight=0.5)  # learns a mean of rewards
    return {**found, "kto_pair and bco": Preference(bco)}


def margin(record: dict[str, float]) -> float:
    """Of a step of any of the stages."""
    if "margin" in record:
        return record["margin"]
    if "rewards/margins" in record:
        return record["rewards/margins"]
    chosen, rejected = (
        record[f"rewards_{side}"] / record[f"share_{side}"] for side in ("chosen", "rejected")
    )
    return chosen - rejected


def state_of(engine: Engine, objective: Any) -> tuple[Any, Any]:
    """What a checkpoint holds of both."""
    learned = objective.state_dict() if isinstance(objective, LearningObjective) else None
    return copied(engine.state_dict()), learned


def resume(training: Training, objective: Any, state: tuple[Any, Any]) -> Engine:
    engine, learned = state
    training.core.engine.load_state_dict(copied(engine))
    if learned is not None:
        objective.load_state_dict(learned)
    return training.core.engine


@pytest.mark.parametrize("tuning", TUNING)
@pytest.mark.parametrize("stage", ["dpo", "kto", "rm"])
def test_every_loss_begins_rises_and_resumes(site: Site, stage: str, tuning: str) -> None:
    """One engine goes through, another goes on at midway; its weights are then those of before."""
    keys = {**TUNING[tuning], "model_name_or_path": str(site.root / "wide"), "max_steps": 20}
    if stage != "rm":
        keys["precompute_ref_logps"] = False
    whole, other = (site.assemble(stage=stage, **keys) for _ in range(2))
    assert any("lora" in name for name in whole.core.engine.model.state_dict()) == (
        tuning != "full"
    )
    steps = [whole.train.step(0)] * STEPS
    start = copied(whole.core.engine.state_dict())
    for name, objective in objectives(stage).items():
        straight = whole.core.engine
        straight.load_state_dict(copied(start))
        log = train(straight, objective, steps[:MIDWAY])
        state = state_of(straight, objective)
        log += train(straight, objective, steps[MIDWAY:])
        check_course(name, log)
        fresh = objectives(stage)[name]
        resumed = resume(other, fresh, state)
        assert train(resumed, fresh, steps[MIDWAY:]) == log[MIDWAY:], name
        ends = resumed.state_dict()["trainable"]
        for key, tensor in straight.state_dict()["trainable"].items():
            assert torch.equal(ends[key], tensor), (name, key)
        assert any((ends[key] != state[0]["trainable"][key]).any() for key in ends), name


def check_course(name: str, log: list[dict[str, float]]) -> None:
    """The first loss in closed form, where there is one; then it falls, and margins rise."""
    firsts = {**FIRST, "kto": 0.5, "kto_pair and bco": (0.5 + 0.5 * 2 * math.log(2)) / 1.5}
    if name in firsts:
        assert log[0]["loss"] == pytest.approx(firsts[name], abs=1e-5)
    assert log[-1]["loss"] < log[0]["loss"], name
    assert margin(log[-1]) > margin(log[0]), name
