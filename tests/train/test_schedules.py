"""Schedules against transformers' and torch's own values, the warm-up's length, the plateau."""

import pytest
import torch
from torch import nn

from llmray.arguments.optimizer import OptimizerArguments
from llmray.arguments.settings import SCHEDULE_SETTINGS, StableSettings
from llmray.train.schedules import SCHEDULES, Horizon, schedule, stable_and_decay, warmup_steps

TOTAL = 40
# name, settings; every setting of every schedule is away from its default once
CASES = [
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.5}),
    ("cosine_with_restarts", {}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("polynomial", {}),
    ("polynomial", {"lr_end": 1e-3, "power": 2.0}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 5}),
    ("cosine_with_min_lr", {"min_lr": 2e-3}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.3, "num_cycles": 1.0}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", {"min_lr": 1e-3, "warmup_lr_rate": 0.2, "num_cycles": 1.0}),
    ("warmup_stable_decay", {"num_decay_steps": 9}),
    ("warmup_stable_decay", {"num_decay_steps": 9, "num_stable_steps": 12, "min_lr_ratio": 0.1}),
    (
        "warmup_stable_decay",
        {"num_decay_steps": 20, "warmup_type": "1-sqrt", "decay_type": "1-sqrt"},
    ),
    (
        "warmup_stable_decay",
        {"num_decay_steps": 20, "warmup_type": "cosine", "decay_type": "linear"},
    ),
    ("warmup_stable_decay", {"num_decay_steps": 20, "num_cycles": 1.5}),
]
PLATEAUS = [
    {},
    {"patience": 2, "factor": 0.5, "cooldown": 2, "min_lr": 1e-3},
    {"patience": 0, "threshold": 0.2, "threshold_mode": "abs", "eps": 1e-3},
    {"patience": 1, "mode": "max", "threshold": 0.1},
    {"patience": 1, "mode": "max", "threshold": 0.3, "threshold_mode": "abs"},
]
METRICS = [3.0, 2.5, 2.4, 2.45, 2.41, 2.6, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 0.9] * 4


def arguments(**keys):
    return OptimizerArguments(learning_rate=0.01, **keys)


def theirs(name, warmup, settings):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01)
    made = get_scheduler(name, optimizer, warmup, TOTAL, settings)
    return optimizer, made


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_rates_equal_transformers(name, settings, warmup):
    """Rates up to 0.01 within 1e-9: factors within 1e-7."""
    optimizer, expected = theirs(name, warmup, settings)
    keys = {"lr_scheduler_kwargs": settings, "warmup_steps": warmup}
    ours = schedule(arguments(lr_scheduler_type=name, **keys), TOTAL)
    for step in range(TOTAL):
        assert 0.01 * ours(step) == pytest.approx(expected.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        expected.step()


@pytest.mark.parametrize("settings", PLATEAUS)
def test_plateau_equals_torch(settings):
    optimizer, expected = theirs("reduce_lr_on_plateau", 0, settings)
    keys = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": settings}
    ours = schedule(arguments(**keys), TOTAL)
    rates = set()
    for metric in METRICS:
        expected.step(metric)
        ours.observe(metric, greater_is_better=False)
        rates.add(optimizer.param_groups[0]["lr"])
        assert 0.01 * ours(0) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
    assert len(rates) > 1


def test_plateau_takes_the_direction_of_the_metric():
    keys = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0}}
    ours = schedule(arguments(**keys), TOTAL)
    for accuracy in (0.1, 0.2, 0.3):
        ours.observe(accuracy, greater_is_better=True)
    assert ours(0) == 1.0
    ours.observe(0.2, greater_is_better=True)
    assert ours(0) == pytest.approx(0.1)


@pytest.mark.parametrize("gamma", [0.1, 0.5])
def test_steps_equal_torch(gamma):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01)
    expected = torch.optim.lr_scheduler.StepLR(optimizer, 7, gamma)
    settings = {"step_size": 7, "gamma": gamma}
    ours = schedule(arguments(lr_scheduler_type="step", lr_scheduler_kwargs=settings), TOTAL)
    for step in range(TOTAL):
        assert 0.01 * ours(step) == pytest.approx(expected.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        expected.step()


def test_steps_count_from_the_end_of_the_warmup():
    keys = {"lr_scheduler_type": "step", "lr_scheduler_kwargs": {"step_size": 2, "gamma": 0.5}}
    ours = schedule(arguments(**keys, warmup_steps=2), TOTAL)
    assert [ours(step) for step in range(7)] == [0, 0.5, 1, 1, 0.5, 0.5, 0.25]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, (10, 20)),  # a third of the 30 steps after the warm-up, then two
        ({"num_decay_steps": 6}, (24, 6)),
        ({"num_stable_steps": 6}, (6, 24)),
        ({"num_stable_steps": 6, "num_decay_steps": 5}, (6, 5)),
    ],
)
def test_lengths_of_stable_and_decay(keys, expected):
    assert stable_and_decay(Horizon(37, 7, 0.01), StableSettings(**keys)) == expected


def test_every_schedule_is_here():
    cases = {name for name, _ in CASES} | {"reduce_lr_on_plateau", "step"}
    assert cases == set(SCHEDULES) | {"reduce_lr_on_plateau"} == set(SCHEDULE_SETTINGS)
    for name, group in SCHEDULE_SETTINGS.items():
        tried = [keys for case, keys in CASES if case == name]
        tried += PLATEAUS if name == "reduce_lr_on_plateau" else []
        tried += [{"step_size": 7, "gamma": 0.5}] if name == "step" else []
        assert {setting for keys in tried for setting in keys} == set(group.model_fields)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"warmup_ratio": 0.1}, 11),  # 10.1 updates, rounded up
        ({"warmup_steps": 5}, 5),
        ({"warmup_steps": 5, "warmup_ratio": 0.5}, 5),  # whole steps win
        ({"warmup_steps": 0.25}, 26),  # below 1: a ratio
        ({}, 0),
    ],
)
def test_warmup_length(keys, expected):
    assert warmup_steps(arguments(**keys), 101) == expected
