"""Schedules against transformers' own values, parameter groups, warm-up."""

import pytest
import torch
from torch import nn

from llmray.arguments.optimizer import OptimizerArguments
from llmray.train.optimizers import OPTIMIZERS, SCHEDULES, build, schedule, warmup_steps


def arguments(**keys):
    return OptimizerArguments(**keys)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedule_equals_transformers(name, warmup):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=40)
    ours = schedule(arguments(lr_scheduler_type=name, warmup_steps=warmup), 40)
    for step in range(40):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-7)
        optimizer.step()
        theirs.step()


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


def test_norms_and_biases_do_not_decay():
    model = Tiny()
    trainable = dict(model.named_parameters())
    optimizer = build(model, trainable, arguments(weight_decay=0.1))
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert {name: decay[id(p)] for name, p in trainable.items()} == {
        "linear.weight": 0.1,
        "linear.bias": 0.0,
        "norm.weight": 0.0,
        "norm.bias": 0.0,
    }


def test_one_adamw_update_by_hand():
    """First update of Adam: m / sqrt(v) = sign(g) up to eps; decay multiplies by 1 - lr * wd.

    w = 2, g = 3, lr = 0.1, wd = 0.5: 2 * (1 - 0.05) - 0.1 * 1 = 1.8.
    """
    for name in OPTIMIZERS:
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, 2.0)
        keys = arguments(learning_rate=0.1, weight_decay=0.5, optim=name, adam_epsilon=1e-12)
        optimizer = build(model, dict(model.named_parameters()), keys)
        model.weight.grad = torch.full((1, 1), 3.0)
        optimizer.step()
        assert model.weight.item() == pytest.approx(1.8, abs=1e-6)
